"""Files of sequences (a line: user, then item ids), and tables that would be misread as such."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl

from r2ec_fast.data.blocks import file_text
from r2ec_fast.data.detect import SAMPLE_BYTES
from r2ec_fast.data.parse import LATEST_SECOND, parse_times

_WORD = re.compile(r"[^\s,]+")
_ONE_OF_TIMES = 1e8  # 1973: a number above it, in a column of such, is a time
_RATINGS = (0.0, 10.0)
_RATING_LINES = 4  # where spaces separate them, fewer may be chance


def refuse_table(path: Path) -> None:
    """ValueError where a file without a known header looks like a table: read as sequences, its
    ratings and times would become items."""
    text = file_text(path)
    lines = text.decode("utf8", "replace").splitlines()
    if len(text) >= SAMPLE_BYTES:
        lines = lines[:-1]
    rows = [words for line in lines if (words := _WORD.findall(line))]
    for mark in ("::", ";", "|"):
        if rows and all(len(row) == 1 and row[0].count(mark) >= 2 for row in rows):
            raise ValueError(f"{_LOOKS.format(path=path)} separated by {mark!r}, {_INSTEAD}")
    widths = {len(row) for row in rows[1:]} or {len(row) for row in rows}
    if len(widths) != 1 or (width := widths.pop()) < 3:
        return
    if len(rows[0]) not in (width, width - 1):  # an index column may have no name
        return
    marked = all("\t" in line or "," in line for line in lines if line.strip())
    headless = len(rows[0]) == width and _numbers(rows[0][2:]) is not None
    body = rows if headless else rows[1:] or rows
    for place in range(2, width):
        column = [row[place] for row in body]
        if _are_times(column):
            raise ValueError(f"{_LOOKS.format(path=path)} with times ({column[0]}), {_INSTEAD}")
        if width <= 4 and _are_ratings(column, [row[1] for row in body], marked):
            raise ValueError(f"{_LOOKS.format(path=path)} with ratings ({column[0]}), {_INSTEAD}")


_LOOKS = "path: {path} looks like a table without a known header,"
_INSTEAD = (
    "not like sequences (a line: user, then item ids); give it a header (user_id, item_id, rating, "
    "timestamp) and the ending .csv or .tsv, or pass format='sequences' if it is what it is"
)


def _numbers(column: list[str]) -> list[float] | None:
    try:
        return [float(value) for value in column]
    except ValueError:
        return None


def _are_times(column: list[str]) -> bool:
    numbers = _numbers(column)
    if numbers is None:
        return bool(
            parse_times(pl.Series([v if _DAY.match(v) else None for v in column], dtype=pl.String))
            .is_not_null()
            .all()
        )
    if any(value.startswith("0") for value in column):
        return False  # an id, e.g. an ISBN
    return all(_ONE_OF_TIMES <= x < LATEST_SECOND * 1e9 for x in numbers)


_DAY = re.compile(r"\d{4}[-/]")


def _are_ratings(column: list[str], items: list[str], marked: bool) -> bool:
    """`marked`: the fields are separated by tabs or commas, as those of tables are."""
    numbers = _numbers(column)
    if numbers is None or not all(_RATINGS[0] <= x <= _RATINGS[1] for x in numbers):
        return False
    if marked or any("." in value for value in column):
        return len(column) > 1
    other = _numbers(items)
    return len(column) >= _RATING_LINES and (other is None or max(other) > _RATINGS[1])

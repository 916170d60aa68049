"""Columns of a file, whatever their types, as what the rules read: text, numbers, times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from r2ec_fast.data.report import LoadReport

IDS = ("user_id", "item_id")
TIMES = ("timestamp",)
NUMBERS = ("rating", "average_rating", "rating_number", "price")
EXPECTED = {
    "id": "text or whole numbers",
    "time": "numbers, text, dates or datetimes",
    "number": "numbers or text",
    "text": "text, numbers, or lists of them",
}


def our_columns(block: pl.DataFrame, theirs: Mapping[str, str], path: Path) -> pl.DataFrame:
    """The columns of a block under our names, as text, lists of text, numbers, dates or datetimes.

    Args:
        block: rows of a file.
        theirs: our name -> the file's.
        path: the file, for messages.

    Raises:
        ValueError: a column of a type that its use does not allow; names the column and the type.
    """
    out = []
    for ours, name in theirs.items():
        use = _use(ours)
        column = _plain(block[name], use)
        if column is None:
            called = repr(name) if name == ours else f"{name!r} ({ours})"
            raise ValueError(
                f"columns: {path} has the column {called} of type {block[name].dtype}; "
                f"expected {EXPECTED[use]}"
            )
        if ours == "title" and isinstance(column.dtype, pl.List):
            column = column.list.eval(pl.element().drop_nulls()).list.join(" ")
        out.append(column.alias(ours))
    return pl.DataFrame(out)


def _use(ours: str) -> str:
    if ours in IDS:
        return "id"
    return "time" if ours in TIMES else "number" if ours in NUMBERS else "text"


def _plain(column: pl.Series, use: str) -> pl.Series | None:
    """The column as its use wants it; None: its type is not one for it."""
    kind = column.dtype
    if kind == pl.String:
        return column
    if kind == pl.Null or isinstance(kind, pl.Categorical | pl.Enum):
        return column.cast(pl.String)
    if kind == pl.Binary:
        try:
            return column.cast(pl.String)
        except pl.exceptions.PolarsError:  # not UTF-8
            return None
    if kind.is_numeric():
        if use == "text":
            return column.cast(pl.String)
        return column.cast(pl.Float64) if kind.is_decimal() and use != "id" else column
    if isinstance(kind, pl.List | pl.Array):
        return _flat_lists(column) if use == "text" else None
    if kind == pl.Boolean:
        return {"number": column.cast(pl.Float64), "text": column.cast(pl.String)}.get(use)
    if kind == pl.Date or isinstance(kind, pl.Datetime):
        return {"time": column, "text": column.cast(pl.String)}.get(use)
    return None


def _flat_lists(column: pl.Series) -> pl.Series | None:
    """Lists (of lists) of scalars as one list of text a row; None: of what is no scalar."""
    inner: Any = column.dtype
    while isinstance(inner, pl.List | pl.Array):
        inner = inner.inner
    plain = _plain(pl.Series([], dtype=inner), "text") if inner != pl.Binary else None
    if plain is None:
        return None
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if column.dtype == pl.List(pl.String):
        return column
    if column.dtype == pl.List(inner):
        return column.list.eval(pl.element().cast(pl.String))
    return pl.Series(column.name, [_leaves(x) for x in column.to_list()], dtype=pl.List(pl.String))


def _leaves(values: object) -> list[str] | None:
    if values is None:
        return None
    out: list[str] = []
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, list):
            out += _leaves(value) or []
        elif value is not None:
            out.append(str(value))
    return out


def json_lists(column: pl.Series) -> pl.Series:
    """Text of a JSON column; where any value was a list, lists of text."""
    like = column.str.contains(r"(?s)^\[.*\]$").fill_null(False)
    lists = {text: found for text in column.filter(like).unique() if (found := _json_list(text))}
    if not lists:
        return column
    rows = [None if x is None else lists.get(x, [x]) for x in column.to_list()]
    return pl.Series(column.name, rows, dtype=pl.List(pl.String))


def _json_list(text: str) -> list[str] | None:
    try:
        return _leaves(json.loads(text, parse_float=str, parse_int=str))
    except (ValueError, RecursionError):
        return None


def drop_nested_ids(rows: pl.DataFrame, what: str, report: LoadReport) -> pl.DataFrame:
    """Rows of JSON Lines without those whose id is a list or an object; `what` a row is."""
    nested = pl.repeat(False, rows.height, eager=True)
    for name in (n for n in IDS if n in rows.columns and rows[n].dtype == pl.String):
        like = rows[name].str.contains(r"(?s)^(?:\[.*\]|\{.*\})$").fill_null(False)
        if like.any():
            found = [value for value in rows[name].filter(like).unique() if _is_json(value)]
            nested = nested | rows[name].is_in(found).fill_null(False)
    rule = "an id is text or a number"
    if not nested.any():
        return rows
    report.add(f"{what} whose id is a JSON list or object", nested.sum(), "dropped", rule)
    return rows.filter(~nested)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True

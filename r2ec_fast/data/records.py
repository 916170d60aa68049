"""A block of whole lines -> a frame.

A block goes to polars' strict parser; only a block which that parser refuses is read again line by
line, where broken lines are counted and skipped.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator

import polars as pl

from r2ec_fast.data.blocks import MAX_LINE_BYTES, ReadStats, whole_lines
from r2ec_fast.data.formats import TextFormat

STRICT_BYTES = 64 << 10  # a refused block this small is read line by line


def header_end(block: bytes) -> int:
    """Length of the first line, its end included."""
    end = block.find(b"\n") + 1
    return end if end else len(block)


def header_names(block: bytes, form: TextFormat) -> list[str]:
    """The columns that a first line names; ValueError where it names one twice."""
    line = block[: header_end(block)].decode("utf8", errors="replace").rstrip("\r\n")
    names = [name.strip() for name in next(_csv_rows([line], form))]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(f"path: the header repeats the columns {repeated}")
    return names


def parse_block(
    block: bytes, columns: list[str], names: list[str], form: TextFormat, stats: ReadStats
) -> pl.DataFrame:
    """The `columns` of a block of whole lines; lines that are no record are counted and skipped.

    Args:
        block: as it lies in the file, without its header.
        columns: columns wanted.
        names: all columns of a line; not read for JSON, whose records name theirs.
        form: the format.
        stats: gets the counts.
    """
    block = _utf8(block, form, stats)
    types = _types(columns, form)
    if not block.strip():
        return pl.DataFrame(schema=types)
    if form.kind == "lines":
        lines = [line.rstrip("\r") for line in block.decode("utf8").removesuffix("\n").split("\n")]
        full = [line for line in lines if line.strip()]
        stats.blank_lines += len(lines) - len(full)
        return pl.DataFrame({"line": full}, schema=types)
    if form.kind == "jsonl":
        return _strict_or_lines(block, columns, types, form, stats)
    frame = _strict_or_lines(block, names, dict.fromkeys(names, pl.String()), form, stats)
    blank = frame.select(pl.all_horizontal(pl.all().is_null())).to_series()
    stats.blank_lines += int(blank.sum())
    return frame.filter(~blank).select(columns)


def _utf8(block: bytes, form: TextFormat, stats: ReadStats) -> bytes:
    if form.separator == "::":
        block = block.replace(b"::", b"\t")
    if form.encoding == "latin-1":
        return block.decode("latin-1").encode()
    good: list[bytes] = []
    start = 0  # of the text not yet checked
    view = memoryview(block)
    while True:
        try:
            codecs.utf_8_decode(view[start:], "strict", True)
        except UnicodeDecodeError as error:
            begin = block.rfind(b"\n", start, start + error.start) + 1 or start
            end = block.find(b"\n", start + error.start) + 1 or len(block)
            good += [block[start:begin], block[begin:end].decode("utf8", "replace").encode()]
            stats.replaced_lines += 1
            start = end
        else:
            return b"".join([*good, view[start:]]) if good else block


def _strict_or_lines(
    block: bytes,
    names: list[str],
    types: dict[str, pl.DataType],
    form: TextFormat,
    stats: ReadStats,
) -> pl.DataFrame:
    """The strict parser; where it refuses, halves of the block, at last its lines one by one."""
    try:
        if form.kind == "jsonl":
            return pl.read_ndjson(block, schema=types)
        return pl.read_csv(
            block, has_header=False, schema=types, separator=form.delimiter, quote_char=form.quote
        )
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        cut = whole_lines(block[: len(block) // 2], form) if len(block) > STRICT_BYTES else 0
        if cut == 0:
            by_line = _json_lines if form.kind == "jsonl" else _csv_lines
            return by_line(block, names, form, stats)
    halves = [h for h in (block[:cut], block[cut:]) if h.strip()]
    return pl.concat([_strict_or_lines(h, names, types, form, stats) for h in halves])


def _types(columns: list[str], form: TextFormat) -> dict[str, pl.DataType]:
    return {
        name: pl.List(pl.String) if name in form.list_columns else pl.String() for name in columns
    }


def _json_lines(
    block: bytes, columns: list[str], form: TextFormat, stats: ReadStats
) -> pl.DataFrame:
    rows: dict[str, list[object]] = {name: [] for name in columns}
    for line in block.splitlines():
        if not line.strip():
            stats.blank_lines += 1
            continue
        record = json_record(line)
        if record is None:
            stats.broken_lines += 1
            continue
        for name in columns:
            value = record.get(name)
            if name in form.list_columns:
                values = value if isinstance(value, list) else [value]
                rows[name].append(None if value is None else [_json_text(v) for v in values])
            else:
                rows[name].append(_json_text(value))
    return pl.DataFrame(rows, schema=_types(columns, form))


def json_record(line: bytes) -> dict[str, object] | None:
    """The object that a line holds; None where it holds something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _json_text(value: object) -> str | None:
    if value is None or value != value:
        return None
    if isinstance(value, str):
        # A lone surrogate is valid JSON and no valid text.
        return value.encode("utf8", errors="replace").decode("utf8")
    return json.dumps(value, ensure_ascii=False)


def _csv_lines(block: bytes, names: list[str], form: TextFormat, stats: ReadStats) -> pl.DataFrame:
    csv.field_size_limit(MAX_LINE_BYTES)
    text = io.StringIO(block.decode("utf8"), newline="")
    rows: list[list[str | None]] = []
    reader = _csv_rows(text, form)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error:
            stats.broken_lines += 1
            continue
        if not row:
            stats.blank_lines += 1
        elif len(row) > len(names):
            stats.broken_lines += 1
        else:
            rows.append([x or None for x in row] + [None] * (len(names) - len(row)))
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def _csv_rows(lines: Iterable[str], form: TextFormat) -> Iterator[list[str]]:
    if form.quote is None:
        return csv.reader(lines, delimiter=form.delimiter, quoting=csv.QUOTE_NONE)
    return csv.reader(lines, delimiter=form.delimiter, quotechar=form.quote)

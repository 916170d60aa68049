"""A block of whole lines -> a frame.

A block goes to polars' strict parser; only a block which that parser refuses is read again line by
line, where broken lines are counted and skipped.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import polars as pl

from r2ec_fast.data.blocks import MAX_LINE_BYTES, ReadStats, whole_lines
from r2ec_fast.data.formats import TextFormat
from r2ec_fast.data.parse import decimal_text

if TYPE_CHECKING:
    from _csv import Reader

HEADER_BYTES = 1 << 20
STRICT_BYTES = 64 << 10  # a refused block this small is read line by line


def header_end(block: bytes, form: TextFormat) -> int:
    """Length of the header, its end included; a line break between quotes does not end it."""
    return _header(block, form)[1]


def header_names(block: bytes, form: TextFormat) -> list[str]:
    """The columns that a header names; ValueError where it names one twice."""
    names = _header(block, form)[0]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(f"path: the header repeats the columns {repeated}")
    return names


def _header(block: bytes, form: TextFormat) -> tuple[list[str], int]:
    head = block[:HEADER_BYTES]
    text = head.decode("latin-1" if form.encoding == "latin-1" else "utf8", errors="replace")
    if form.separator == "::":
        text = text.replace("::", "\t")
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = _csv_rows(io.StringIO(text, newline=""), form)
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise ValueError(f"path: the header is no line of {form.kind}: {error}") from error
    ends = islice(re.finditer(rb"\r\n?|\n", head), reader.line_num - 1, reader.line_num)
    end = next((match.end() for match in ends), len(block))
    return names, end


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
    before = stats.replaced_lines + stats.lone_surrogates
    stats.marks = not _holds_marks(block)
    frame = _parse(_utf8(block, form, stats), columns, names, form, stats)
    if not stats.marks or stats.replaced_lines + stats.lone_surrogates == before:
        return frame
    return _with_replacements(frame, form, stats)


def _parse(
    block: bytes, columns: list[str], names: list[str], form: TextFormat, stats: ReadStats
) -> pl.DataFrame:
    types = _types(columns, form)
    if not block.strip():
        return pl.DataFrame(schema=types)
    if form.kind == "lines":
        text = block.decode("utf8").replace("\r\n", "\n").replace("\r", "\n")
        lines = text.removesuffix("\n").split("\n")
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
    how = _MARKED if stats.marks else "replace"
    good: list[bytes] = []
    start = 0  # of the text not yet checked
    view = memoryview(block)
    while True:
        try:
            codecs.utf_8_decode(view[start:], "strict", True)
        except UnicodeDecodeError as error:
            begin = block.rfind(b"\n", start, start + error.start) + 1 or start
            end = block.find(b"\n", start + error.start) + 1 or len(block)
            good += [block[start:begin], block[begin:end].decode("utf8", how).encode()]
            stats.replaced_lines += 1
            start = end
        else:
            return b"".join([*good, view[start:]]) if good else block


# What is no text is marked until ids are known and compared, then shown as U+FFFD. Each mark is one
# private character of plane 16: lone surrogates at 10F000.., a wrong byte at 10F800.., the bytes
# that go with it at 10F900.. (Python shows one U+FFFD for all of them).
_MARKED = "r2ec-marked"
_HALF = "[\ud800-\udfff]"
_SHOWN_MARK = "[\U0010f000-\U0010f8ff]"
_HIDDEN_MARK = "[\U0010f900-\U0010f9ff]"
_MARK = "[\U0010f000-\U0010f9ff]"


def _holds_marks(block: bytes) -> bool:
    """Whether the text itself may use the marks' characters; then no marks are set."""
    return b"\xf4\x8f" in block or re.search(rb"\\u[dD][bB][fF]", block) is not None


def _mark(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    first, *rest = error.object[error.start : error.end]
    return chr(0x10F800 + first) + "".join(chr(0x10F900 + b) for b in rest), error.end


codecs.register_error(_MARKED, _mark)


def _half_mark(marks: bool, match: re.Match[str]) -> str:
    return chr(ord(match[0]) - 0xD800 + 0x10F000) if marks else "\ufffd"


def _unmarked(text: str) -> str:
    """What a marked text stood for, readable: "caf\\xe9"."""

    def source(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\x{code & 0xFF:02x}" if code >= 0x10F800 else f"\\u{code - 0x10F000 + 0xD800:04x}"

    return re.sub(_MARK, source, text)


def _with_replacements(frame: pl.DataFrame, form: TextFormat, stats: ReadStats) -> pl.DataFrame:
    """Marks become U+FFFD; ValueError where that would make two ids one."""
    for name in frame.columns:
        column = frame[name]
        if column.dtype == pl.String and name in stats.id_columns:
            rows = column.filter(column.str.contains(_MARK + "|\ufffd").fill_null(False))
            marked = rows.unique(maintain_order=True).to_list()
            if form.kind == "lines":
                marked = [word for line in marked for word in re.findall(r"[^\s,]+", line)]
            for raw in marked:
                shown = re.sub(_HIDDEN_MARK, "", re.sub(_SHOWN_MARK, "\ufffd", raw))
                other = stats.replaced.setdefault(shown, raw)
                if other != raw:
                    raise ValueError(
                        f"path: {stats.path} is not UTF-8: its ids '{_unmarked(other)}' and "
                        f"'{_unmarked(raw)}' (column {name!r}) would become one; save it as UTF-8, "
                        f"e.g. iconv -f WINDOWS-1252 -t UTF-8"
                    )

    def repaired(text: pl.Expr) -> pl.Expr:
        return text.str.replace_all(_SHOWN_MARK, "\ufffd").str.replace_all(_HIDDEN_MARK, "")

    lists = [n for n in frame.columns if isinstance(frame[n].dtype, pl.List)]
    plain = [n for n in frame.columns if frame[n].dtype == pl.String]
    return frame.with_columns(
        *(repaired(pl.col(n)) for n in plain),
        *(pl.col(n).list.eval(repaired(pl.element())) for n in lists),
    )


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
            if not _LONE_SURROGATE.search(block):  # polars would read any of them as NUL
                return pl.read_ndjson(block, schema=types)
        elif not _has_lone_return(block):
            return pl.read_csv(
                block,
                has_header=False,
                schema=types,
                separator=form.delimiter,
                quote_char=form.quote,
            )
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        pass
    cut = whole_lines(block[: len(block) // 2], form) if len(block) > STRICT_BYTES else 0
    if cut == 0:
        by_line = _json_lines if form.kind == "jsonl" else _csv_lines
        return by_line(block, names, form, stats)
    halves = [h for h in (block[:cut], block[cut:]) if h.strip()]
    return pl.concat([_strict_or_lines(h, names, types, form, stats) for h in halves])


_LONE_SURROGATE = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2})"
)


def _has_lone_return(block: bytes) -> bool:
    returns = block.count(b"\r")
    return returns > 0 and returns != block.count(b"\r\n")


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
        halved = False
        for name in columns:
            value = record.get(name)
            values = value if name in form.list_columns and isinstance(value, list) else [value]
            texts = [_json_text(v) for v in values]
            if any(re.search(_HALF, text) for text in texts if text):
                halved = True
                texts = [t and re.sub(_HALF, partial(_half_mark, stats.marks), t) for t in texts]
            if name not in form.list_columns:
                rows[name].append(texts[0])
            else:
                rows[name].append(None if value is None else texts)
        stats.lone_surrogates += halved
    return pl.DataFrame(rows, schema=_types(columns, form))


def json_record(line: bytes) -> dict[str, object] | None:
    """The object that a line holds; None where it holds something else. Of a repeated key the first
    value is taken, as the strict parser does."""
    try:
        record = json.loads(line, object_pairs_hook=_first_of_each)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _first_of_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record: dict[str, object] = {}
    for name, value in pairs:
        record.setdefault(name, value)
    return record


def _json_text(value: object, *, inside: bool = False) -> str | None:
    """A JSON value as text, spelled as the strict parser spells it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if inside else value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return decimal_text(value)
    if isinstance(value, list):
        return f"[{', '.join(_json_text(v, inside=True) or 'null' for v in value)}]"
    if isinstance(value, dict):
        parts = (
            f"{_json_text(k, inside=True)}: {_json_text(v, inside=True) or 'null'}"
            for k, v in value.items()
        )
        return f"{{{', '.join(parts)}}}"
    return "null" if inside else None


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


def _csv_rows(lines: Iterable[str], form: TextFormat) -> Reader:
    if form.quote is None:
        return csv.reader(lines, delimiter=form.delimiter, quoting=csv.QUOTE_NONE)
    return csv.reader(lines, delimiter=form.delimiter, quotechar=form.quote)

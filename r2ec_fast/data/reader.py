"""Bounded-memory reading of CSV, TSV, JSON Lines and Parquet, plain or gzip, damaged or not.

A file is read in blocks of whole lines. A block goes to polars' strict parser; only a block which
that parser refuses is read again line by line, where broken lines are counted and skipped.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from r2ec_fast.data.report import LoadReport

BLOCK_BYTES = 16 << 20
MAX_LINE_BYTES = 64 << 20
STRICT_BYTES = 64 << 10  # a refused block this small is read line by line
MAX_BROKEN_SHARE = 0.01  # more broken lines than this: the file is of another format
PARQUET_ROWS = 1 << 20
_OPEN_QUOTE = "a quote that never closes; pass quote=None if quotes are ordinary characters there"
KINDS = ("csv", "tsv", "jsonl", "parquet", "lines")


@dataclass
class ReadStats:
    """What one pass over a file met.

    Args:
        rows: rows handed on.
        broken_lines: lines that are no record (half a JSON line, too many fields), skipped.
        blank_lines: empty lines, skipped.
        replaced_lines: lines with bytes that are not UTF-8, replaced by U+FFFD.
        truncated: the gzip stream ends before its end mark.
        bytes_read, sha256: of the file as it lies on disk (Parquet is not hashed on the way).
    """

    path: str = ""
    rows: int = 0
    broken_lines: int = 0
    blank_lines: int = 0
    replaced_lines: int = 0
    truncated: bool = False
    bytes_read: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class TextFormat:
    """How lines become columns.

    Args:
        kind: one of "csv", "tsv", "jsonl", "parquet", "lines" (one text column named "line").
        separator: one character, or "::" (MovieLens 1M).
        quote: '"' or None where quotes are ordinary characters.
        encoding: "utf8" or "latin-1".
        names: column names of a file without header line; None reads the header.
    """

    kind: str
    separator: str = ","
    quote: str | None = '"'
    encoding: str = "utf8"
    names: tuple[str, ...] | None = None
    list_columns: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {self.kind!r}")


def guess_format(path: str | Path) -> TextFormat:
    """The format that a file's name says; raises ValueError for an unknown ending."""
    name = Path(path).name.lower().removesuffix(".gz")
    if name.endswith(".csv"):
        return TextFormat("csv")
    if name.endswith(".tsv"):
        return TextFormat("tsv", separator="\t", quote=None)
    if name.endswith((".inter", ".item")):
        return TextFormat("tsv", separator="\t", quote=None)
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return TextFormat("jsonl")
    if name.endswith((".parquet", ".pq")):
        return TextFormat("parquet")
    if name.endswith(".txt"):
        return TextFormat("lines", quote=None)
    raise ValueError(
        f"path: cannot tell the format of {Path(path).name!r} from its name; expected "
        ".csv, .tsv, .jsonl, .parquet, .inter, .item or .txt, each also with .gz"
    )


def column_names(path: str | Path, form: TextFormat) -> list[str]:
    """The columns of a file: its header, its Parquet schema, or the keys of its first records."""
    _check_readable(Path(path))
    if form.kind == "parquet":
        return list(pl.read_parquet_schema(path))
    if form.kind == "lines":
        return ["line"]
    if form.names is not None:
        return list(form.names)
    first = next(_blocks(Path(path), form, ReadStats()), b"")
    if not first.strip():
        raise ValueError(f"path: {path} is empty")
    if form.kind == "jsonl":
        names: dict[str, None] = {}
        for line in first.splitlines()[:1000]:
            record = _json_record(line)
            if record is not None:
                names.update(dict.fromkeys(record))
        if not names:
            raise ValueError(f"path: {path} holds no JSON object in its first lines")
        return list(names)
    return _split_header(first, form)


def read_blocks(
    path: str | Path,
    columns: list[str],
    form: TextFormat,
    stats: ReadStats,
    *,
    truncated: str = "refuse",
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[pl.DataFrame]:
    """Yield a file's rows as frames of `columns`: text, or list of text for `form.list_columns`.

    Args:
        path: the file; ".gz" is read on the fly.
        columns: columns wanted, all of them in the file (a JSON record may lack some: null).
        form: the format.
        stats: filled while reading; complete when the iterator ends.
        truncated: "refuse" raises ValueError for a gzip stream that stops early; "keep" hands on
            the rows before the break.
        block_bytes: text held at a time.

    Raises:
        FileNotFoundError, ValueError: no such file, an empty file, a damaged gzip stream, more
            than 1% broken lines, or a line above 64 MiB.
    """
    if truncated not in ("refuse", "keep"):
        raise ValueError(f"truncated: expected 'refuse' or 'keep', got {truncated!r}")
    path = Path(path)
    _check_readable(path)
    stats.path = path.name
    if form.kind == "parquet":
        yield from _parquet_blocks(path, columns, stats)
        return
    names = None if form.kind == "jsonl" else column_names(path, form)
    has_header = names is not None and form.names is None and form.kind != "lines"
    for block in _blocks(path, form, stats, block_bytes):
        if has_header:
            block = block[_header_end(block, form) :]
            has_header = False
        frame = _parse(_utf8(block, form, stats), columns, names, form, stats)
        stats.rows += frame.height
        if frame.height:
            yield frame
    if stats.truncated and truncated == "refuse":
        raise ValueError(
            f"path: {path} ends in the middle of its gzip stream (after {stats.rows:,} rows); "
            "fetch it again, or pass truncated='keep' to use the rows before the break"
        )
    if stats.broken_lines > max(10, MAX_BROKEN_SHARE * (stats.rows + stats.broken_lines)):
        raise ValueError(
            f"path: {stats.broken_lines:,} of {stats.rows + stats.broken_lines:,} lines of {path} "
            f"are not valid {form.kind}; more than {MAX_BROKEN_SHARE:.0%}, so this looks like "
            "another format"
        )


def add_read_lines(stats: ReadStats, report: LoadReport) -> None:
    """Enter what reading met into a LoadReport."""
    name = stats.path
    report.add(f"{name}: broken line", stats.broken_lines, "dropped", "a line that is no record")
    report.add(f"{name}: blank line", stats.blank_lines, "dropped", "an empty line")
    report.add(
        f"{name}: line with non-UTF-8 bytes", stats.replaced_lines, "changed", "bytes -> U+FFFD"
    )
    report.add(
        f"{name}: truncated gzip", int(stats.truncated), "kept", "rows before the break are used"
    )


def _check_readable(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"path: no such file {path}")
    if path.is_dir():
        raise ValueError(f"path: expected a file, {path} is a directory")
    if path.stat().st_size == 0:
        raise ValueError(f"path: {path} is empty")


def _parquet_blocks(path: Path, columns: list[str], stats: ReadStats) -> Iterator[pl.DataFrame]:
    stats.bytes_read = path.stat().st_size
    with open(path, "rb") as file:
        stats.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    scan = pl.scan_parquet(path).select(columns)
    start = 0
    while True:
        frame = scan.slice(start, PARQUET_ROWS).collect()
        if frame.height == 0:
            break
        start += frame.height
        stats.rows += frame.height
        yield frame


def _raw(path: Path, stats: ReadStats, piece_bytes: int) -> Iterator[bytes]:
    """Decompressed bytes in pieces of at most `piece_bytes`; hashes what lies on disk."""
    digest = hashlib.sha256()
    inflate = zlib.decompressobj(31) if path.suffix == ".gz" else None
    with open(path, "rb") as file:
        while piece := file.read(piece_bytes):
            digest.update(piece)
            stats.bytes_read += len(piece)
            if inflate is None:
                yield piece
                continue
            while piece:
                if inflate.eof:  # a further gzip member, or zero padding
                    piece = piece.lstrip(b"\0")
                    if not piece:
                        break
                    inflate = zlib.decompressobj(31)
                try:
                    out = inflate.decompress(piece, piece_bytes)
                except zlib.error as error:
                    raise ValueError(
                        f"path: {path} is damaged gzip near byte {stats.bytes_read:,}: {error}"
                    ) from error
                if out:
                    yield out
                piece = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
    stats.sha256 = digest.hexdigest()
    if inflate is not None:
        stats.truncated = not inflate.eof


def _blocks(
    path: Path, form: TextFormat, stats: ReadStats, block_bytes: int = BLOCK_BYTES
) -> Iterator[bytes]:
    """Blocks of whole lines; a line break inside a quoted field does not end a block."""
    pieces: list[bytes] = []
    size = 0
    first = True
    wanted = block_bytes
    for piece in _raw(path, stats, min(block_bytes, 1 << 20)):
        pieces.append(piece)
        size += len(piece)
        if size < wanted:
            continue
        text = b"".join(pieces)
        if first:
            text = text.removeprefix(b"\xef\xbb\xbf")
        cut = _cut(text, form)
        if cut == 0:
            if len(text) > MAX_LINE_BYTES:
                what = f"a record longer than {MAX_LINE_BYTES:,} bytes"
                raise ValueError(f"path: {path} has {_OPEN_QUOTE if form.quote else what}")
            wanted = 2 * len(
                text
            )  # grows geometrically: a long line is not scanned again and again
            pieces, size = [text], len(text)
            continue
        first, wanted = False, block_bytes
        yield text[:cut]
        pieces, size = [text[cut:]], len(text) - cut
    text = b"".join(pieces)
    if first:
        text = text.removeprefix(b"\xef\xbb\xbf")
    if text:
        yield _closed(text, path, form, stats)


def _closed(text: bytes, path: Path, form: TextFormat, stats: ReadStats) -> bytes:
    """The file's last block. An open quote may have swallowed one half-written line, not more."""
    if form.quote is None or form.kind in ("jsonl", "lines"):
        return text
    if text.count(form.quote.encode()) % 2 == 0:
        return text
    cut = _cut(text, form)
    if b"\n" in text[cut:].rstrip(b"\r\n"):
        raise ValueError(f"path: {path} has {_OPEN_QUOTE}")
    stats.broken_lines += 1
    return text[:cut]


def _cut(text: bytes, form: TextFormat) -> int:
    cut = text.rfind(b"\n") + 1
    if form.quote is None or form.kind in ("jsonl", "lines"):
        return cut
    mark = form.quote.encode()
    odd = text.count(mark, 0, cut) % 2
    while cut and odd:
        before = text.rfind(b"\n", 0, cut - 1) + 1
        odd ^= text.count(mark, before, cut) % 2
        cut = before
    return cut


def _header_end(block: bytes, form: TextFormat) -> int:
    end = block.find(b"\n") + 1
    return end if end else len(block)


def _split_header(block: bytes, form: TextFormat) -> list[str]:
    line = block[: _header_end(block, form)].decode("utf8", errors="replace").rstrip("\r\n")
    rows = csv.reader([line], delimiter=form.separator, **_quoting(form))
    names = [name.strip() for name in next(rows)]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(f"path: the header repeats the columns {repeated}")
    return names


def _quoting(form: TextFormat) -> dict[str, object]:
    if form.quote is None:
        return {"quoting": csv.QUOTE_NONE}
    return {"quotechar": form.quote}


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


def _parse(
    block: bytes, columns: list[str], names: list[str] | None, form: TextFormat, stats: ReadStats
) -> pl.DataFrame:
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
        separator = "\t" if form.separator == "::" else form.separator
        return pl.read_csv(
            block, has_header=False, schema=types, separator=separator, quote_char=form.quote
        )
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        cut = _cut(block[: len(block) // 2], form) if len(block) > STRICT_BYTES else 0
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
        record = _json_record(line)
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


def _json_record(line: bytes) -> dict[str, object] | None:
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
    separator = "\t" if form.separator == "::" else form.separator
    csv.field_size_limit(MAX_LINE_BYTES)
    text = io.StringIO(block.decode("utf8"), newline="")
    rows: list[list[str | None]] = []
    reader = csv.reader(text, delimiter=separator, **_quoting(form))
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

"""Bounded-memory reading of CSV, TSV, JSON Lines and Parquet, plain or gzip, damaged or not."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from r2ec_fast.data.blocks import BLOCK_BYTES, ReadStats, file_text, line_blocks
from r2ec_fast.data.detect import PARQUET, SAMPLE_BYTES, content_of, refuse_binary
from r2ec_fast.data.formats import TextFormat
from r2ec_fast.data.records import header_end, header_names, json_record, parse_block
from r2ec_fast.data.report import LoadReport

MAX_BROKEN_SHARE = 0.01  # more broken lines than this: the file is of another format
PARQUET_ROWS = 1 << 20


def column_names(path: str | Path, form: TextFormat) -> list[str]:
    """The columns of a file: its header, its Parquet schema, or the keys of its first records."""
    _check_readable(Path(path))
    if form.kind == "parquet":
        return list(_parquet_schema(Path(path)))
    if form.kind == "lines":
        return ["line"]
    if form.names is not None:
        return list(form.names)
    first = next(line_blocks(Path(path), form, ReadStats()), b"")
    if not first.strip():
        raise ValueError(f"path: {path} is empty")
    if form.kind == "jsonl":
        names: dict[str, None] = {}
        for line in first.splitlines()[:1000]:
            record = json_record(line)
            if record is not None:
                names.update(dict.fromkeys(record))
        if not names:
            raise ValueError(f"path: {path} holds no JSON object in its first lines")
        return list(names)
    return header_names(first, form)


SEPARATORS = (",", "\t", ";", "|", "::", " ")


def detect_format(
    path: str | Path, form: TextFormat, is_header: Callable[[Sequence[str]], bool]
) -> TextFormat:
    """The format that a file's content says, where it differs from what its name says.

    Reads a few kilobytes. Parquet, JSON Lines and tables with a known header are recognised under
    any name; else `form` is returned.

    Args:
        path: the file.
        form: what its name says.
        is_header: whether names of columns are those of a table that is looked for.

    Raises:
        FileNotFoundError, ValueError: no such file, an empty one, a binary format other than gzip
            and Parquet, a Parquet file cut short, JSON that is not one object a line.
    """
    path = Path(path)
    _check_readable(path)
    with open(path, "rb") as file:
        head = file.read(SAMPLE_BYTES)
        if content_of(head) == PARQUET:
            file.seek(-4, os.SEEK_END)
            if file.read() != b"PAR1":
                raise ValueError(f"path: {path} is Parquet that stops early: its end is missing")
            return TextFormat("parquet")
    text = file_text(path)
    refuse_binary(text, path)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"path: {path} is empty")
    first = lines[0].strip()
    if json_record(first) is not None:
        return form if form.kind == "jsonl" else TextFormat("jsonl")
    if first.startswith(b"[{") or first == b"[" or (form.kind == "jsonl" and first[:1] == b"["):
        raise ValueError(f"path: {path} holds one JSON array; {_ONE_A_LINE}")
    if first == b"{":
        raise ValueError(f"path: {path} holds JSON objects over several lines; {_ONE_A_LINE}")
    if form.names is not None or (form.kind == "jsonl" and first[:1] == b"{"):
        return form
    if form.kind in ("csv", "tsv") and is_header(_names(first, form)):
        return form
    for separator in SEPARATORS:
        if separator in (";", "|", " ", "::") and form.kind in ("csv", "tsv"):
            continue  # an error names the header that came
        found = TextFormat("tsv", separator, None)
        found = TextFormat("csv") if separator == "," else found
        if is_header(_names(first, found)):
            return found
    if form.kind == "parquet":
        raise ValueError(
            f"path: {path} is no Parquet file (it begins with {head[:8]!r}); expected Parquet, or "
            "CSV, TSV or JSON Lines with known columns"
        )
    return form


_ONE_A_LINE = "expected JSON Lines, one object a line (e.g. jq -c '.[]')"


def _names(line: bytes, form: TextFormat) -> list[str]:
    try:
        return header_names(line, form)
    except ValueError:
        return []


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
    names = [] if form.kind == "jsonl" else column_names(path, form)
    _check_columns(path, columns, names or columns)
    has_header = form.kind in ("csv", "tsv") and form.names is None
    for block in line_blocks(path, form, stats, block_bytes):
        if has_header:
            block = block[header_end(block, form) :]
            has_header = False
        frame = parse_block(block, columns, names, form, stats)
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
    report.add(f"{name}: line with half a character", stats.lone_surrogates, "changed", "-> U+FFFD")
    for what, rule in stats.noted.items():
        report.add(f"{name}: {what}", 1, "noted", rule)
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


def _check_columns(path: Path, wanted: list[str], found: list[str]) -> None:
    absent = [name for name in wanted if name not in found]
    if absent:
        raise ValueError(f"path: {path} has no column {absent[0]!r}; its columns: {found}")


def _parquet_schema(path: Path) -> dict[str, pl.DataType]:
    with _parquet_errors(path), open(path, "rb") as file:
        return dict(pl.read_parquet_schema(file))


def _parquet_blocks(path: Path, columns: list[str], stats: ReadStats) -> Iterator[pl.DataFrame]:
    stats.bytes_read = path.stat().st_size
    with open(path, "rb") as file:
        stats.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    _check_columns(path, columns, list(_parquet_schema(path)))
    start = 0
    while True:
        with _parquet_errors(path):
            scan = pl.scan_parquet(path, glob=False).select(columns)
            frame = scan.slice(start, PARQUET_ROWS).collect()
        if frame.height == 0:
            break
        start += frame.height
        stats.rows += frame.height
        yield frame


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """What the Parquet reader cannot read becomes a ValueError that names the file.

    On some damaged files the reader's own threads panic, which prints their stacks: what is written
    to the process' stderr meanwhile is kept back, and dropped with the error.
    """
    with tempfile.TemporaryFile() as kept:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(kept.fileno(), 2)
        damaged = False
        try:
            yield
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            damaged = True
            reason = str(error).strip().splitlines() or ["damaged"]
            raise ValueError(f"path: {path} is not readable Parquet: {reason[0]}") from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            if not damaged:
                kept.seek(0)
                os.write(2, kept.read())

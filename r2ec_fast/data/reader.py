"""Bounded-memory reading of CSV, TSV, JSON Lines and Parquet, plain or gzip, damaged or not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from r2ec_fast.data.blocks import BLOCK_BYTES, ReadStats, line_blocks
from r2ec_fast.data.formats import TextFormat
from r2ec_fast.data.records import header_end, header_names, json_record, parse_block
from r2ec_fast.data.report import LoadReport

MAX_BROKEN_SHARE = 0.01  # more broken lines than this: the file is of another format
PARQUET_ROWS = 1 << 20


def column_names(path: str | Path, form: TextFormat) -> list[str]:
    """The columns of a file: its header, its Parquet schema, or the keys of its first records."""
    _check_readable(Path(path))
    if form.kind == "parquet":
        return list(pl.read_parquet_schema(path))
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
    has_header = form.kind in ("csv", "tsv") and form.names is None
    for block in line_blocks(path, form, stats, block_bytes):
        if has_header:
            block = block[header_end(block) :]
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

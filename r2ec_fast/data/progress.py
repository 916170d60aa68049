"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from r2ec_fast.data.blocks import ReadStats


def byte_bar(shown: bool) -> Progress:
    """A bar counted in bytes; nothing is printed where `shown` is False."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def reading(
    blocks: Iterator[pl.DataFrame], path: Path, stats: ReadStats, shown: bool
) -> Iterator[pl.DataFrame]:
    """Hand on `blocks` of a file that is being read, with a bar over its bytes on disk."""
    with byte_bar(shown) as bar:
        task = bar.add_task(f"reading {path.name}", total=path.stat().st_size)
        for block in blocks:
            bar.update(task, completed=stats.bytes_read)
            yield block
        bar.update(task, completed=stats.bytes_read)

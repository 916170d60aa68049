"""`load_interactions`: any interaction log -> InteractionData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from r2ec_fast.data.blocks import ReadStats
from r2ec_fast.data.build import (
    CodedEvents,
    EventCollector,
    drop_short_users,
    match_catalog,
    sort_events,
    to_interactions,
)
from r2ec_fast.data.columns import drop_nested_ids, our_columns
from r2ec_fast.data.formats import TextFormat, guess_format
from r2ec_fast.data.items import (
    ITEM_ALIASES,
    clean_items,
    load_items,
    resolve_columns,
    unique_items,
)
from r2ec_fast.data.reader import add_read_lines, column_names, detect_format, read_blocks
from r2ec_fast.data.report import LoadReport
from r2ec_fast.data.sequences import refuse_table
from r2ec_fast.data.settings import LoadSettings
from r2ec_fast.data.sources.movielens import MovieLensLayout, find_movielens
from r2ec_fast.data.types import InteractionData
from r2ec_fast.data.window import cut_window

FORMATS = ("auto", "csv", "tsv", "jsonl", "parquet", "recbole", "movielens", "sequences")
EVENT_ALIASES: dict[str, tuple[str, ...]] = {
    "user_id": ("user_id", "userId", "user", "uid", "reviewerID"),
    "item_id": ("item_id", "itemId", "item", "iid", "movieId", "movie_id", "parent_asin", "asin"),
    "timestamp": ("timestamp", "time", "datetime", "date", "unixReviewTime", "ts"),
    "rating": ("rating", "overall", "score", "stars", "weight"),
}


def load_interactions(
    path: str | Path, *, items: str | Path | None = None, **settings: Any
) -> InteractionData:
    """Read interactions and item text.

    Nothing is dropped or changed silently: `data.report.to_text()` shows every rule and its count.

    Args:
        path: a CSV, TSV, JSON Lines or Parquet file (also .gz), a RecBole .inter file, a MovieLens
            directory, or a file of sequences (a line: user, then item ids, oldest first).
        items: the item table, any of the table formats. None: a RecBole .item file beside `path`
            or MovieLens' own is used; else every item's title is its id, and the report says so.
        **settings: those of `LoadSettings`.

    Returns:
        InteractionData; ids are text; users and items are numbered in text order of their ids.

    Raises:
        FileNotFoundError, ValueError: naming the argument, what was expected and what came.
    """
    return read_interactions(path, items, LoadSettings(**settings))


def read_interactions(
    path: str | Path, items: str | Path | None, settings: LoadSettings
) -> InteractionData:
    """`load_interactions` with the settings as one value."""
    path = Path(path)
    kind = _kind(path, settings.format)
    report = LoadReport(source=path.name)
    layout = find_movielens(path) if kind == "movielens" else None
    events = _read_events(path, kind, layout, report, settings)
    if items is None and kind == "recbole" and path.with_suffix(".item").exists():
        items = path.with_suffix(".item")
    if items is not None:
        table = _read_items(Path(items), report, settings)
    elif layout is not None:
        table = unique_items(clean_items(layout.read_items(report), report), report)
    else:
        table = pl.DataFrame({"item_id": events.item_ids, "title": events.item_ids})
        report.add("item without item table", table.height, "changed", "its id is its title")
    table = match_catalog(events, table, report, missing_text=settings.missing_text)
    events.stage(report, "item text")
    cut_window(events, report, settings)
    drop_short_users(events, report, settings.min_user_events)
    keep = settings.keep_unused_items
    if not (settings.k_core < 2 if keep is None else keep):
        used = events.item_ids.gather(np.unique(events.item))
        table = table.filter(pl.col("item_id").is_in(used.implode()))
    return to_interactions(events, table, report)


def _read_events(
    path: Path,
    kind: str,
    layout: MovieLensLayout | None,
    report: LoadReport,
    settings: LoadSettings,
) -> CodedEvents:
    """The events of the log, ordered, without duplicates."""
    collector = EventCollector(
        report, rating_range=settings.rating_range, min_rating=settings.min_rating
    )
    if layout is not None:
        _collect_table(layout.events, layout.event_form, collector, settings)
    else:
        form = _form(
            path, kind, settings, _tried(EVENT_ALIASES, settings.columns, "user_id", "item_id")
        )
        if form.kind == "lines":
            if settings.format == "auto":
                refuse_table(path)
            _collect_sequences(path, collector, settings.truncated)
        else:
            _collect_table(path, form, collector, settings, typed_header=kind == "recbole")
    events = collector.finish()
    sort_events(events, report, repeats=settings.repeats)
    events.stage(report, "duplicates and rating rules")
    return events


def _read_items(path: Path, report: LoadReport, settings: LoadSettings) -> pl.DataFrame:
    form = _form(
        path, "auto", settings, _tried(ITEM_ALIASES, settings.item_columns, "item_id", "title")
    )
    names = _recbole_names(column_names(path, form)) if path.suffix == ".item" else None
    return load_items(
        path,
        form,
        report,
        item_columns=settings.item_columns,
        names=names,
        truncated=settings.truncated,
    )


def _kind(path: Path, format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {FORMATS}, got {format!r}")
    if not path.exists():
        raise FileNotFoundError(f"path: no such file or directory {path}")
    if format != "auto":
        return format
    if path.is_dir():
        return "movielens"
    if ".inter" in path.suffixes:
        return "recbole"
    kind = guess_format(path).kind
    return "sequences" if kind == "lines" else kind


def _form(
    path: Path, kind: str, settings: LoadSettings, columns: Mapping[str, Sequence[str]]
) -> TextFormat:
    """The format of a file, by its content first; `columns`: what its header must name."""
    if kind in ("csv", "jsonl", "parquet"):
        form = TextFormat(kind)
    elif kind in ("tsv", "recbole"):
        form = TextFormat("tsv", separator="\t", quote=None)
    elif kind == "sequences":
        form = TextFormat("lines", quote=None)
    else:
        form = guess_format(path)
    if not (kind == "sequences" and settings.format == "sequences"):
        form = detect_format(path, form, partial(_is_header, columns))
    text = form.kind in ("csv", "tsv")
    return replace(form, quote=settings.quote) if text and settings.quote != "auto" else form


def _is_header(columns: Mapping[str, Sequence[str]], names: Sequence[str]) -> bool:
    plain = {name.split(":", 1)[0] for name in names}.union(names)
    return all(plain.intersection(tried) for tried in columns.values())


def _tried(
    aliases: Mapping[str, tuple[str, ...]], configured: Mapping[str, str] | None, *ours: str
) -> dict[str, tuple[str, ...]]:
    """Our names -> the names that a header may have for them."""
    return {
        name: (configured[name],) if configured and name in configured else aliases[name]
        for name in ours
    }


def _recbole_names(header: list[str]) -> dict[str, str]:
    return {name: name.split(":", 1)[0] for name in header}


def _collect_table(
    path: Path,
    form: TextFormat,
    collector: EventCollector,
    settings: LoadSettings,
    *,
    typed_header: bool = False,
) -> None:
    header = column_names(path, form)
    plain = [_recbole_names(header)[h] for h in header] if typed_header else header
    required = ("user_id", "item_id")
    found = resolve_columns(plain, EVENT_ALIASES, settings.columns, required, "columns", path)
    theirs = {ours: header[plain.index(column)] for ours, column in found.items()}
    stats = ReadStats(id_columns=(theirs["user_id"], theirs["item_id"]))
    wanted = list(dict.fromkeys(theirs.values()))
    for block in read_blocks(path, wanted, form, stats, truncated=settings.truncated):
        rows = our_columns(block, theirs, path)
        if form.kind == "jsonl":
            rows = drop_nested_ids(rows, "event", collector.report)
        collector.add(rows)
    add_read_lines(stats, collector.report)


def _collect_sequences(path: Path, collector: EventCollector, truncated: str) -> None:
    stats = ReadStats(id_columns=("line",))
    users = lines = alone = 0
    form = TextFormat("lines", quote=None)
    for block in read_blocks(path, ["line"], form, stats, truncated=truncated):
        words = block.select(pl.col("line").str.extract_all(r"[^\s,]+").alias("w"))
        words = words.filter(pl.col("w").list.len() > 0)
        rows = words.select(
            pl.col("w").list.first().alias("user_id"), pl.col("w").list.slice(1).alias("item_id")
        )
        alone += int((rows["item_id"].list.len() == 0).sum())
        users += rows["user_id"].n_unique()
        lines += rows.height
        rows = rows.filter(pl.col("item_id").list.len() > 0)
        collector.add(rows.explode("item_id"))
    add_read_lines(stats, collector.report)
    collector.report.add("line with a user and no item", alone, "dropped", "nothing to learn")
    collector.report.add(
        "further line of a user", lines - users, "kept", "its items follow the earlier line's"
    )

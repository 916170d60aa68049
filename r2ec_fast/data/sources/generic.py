"""`load_interactions`: any interaction log -> InteractionData."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from r2ec_fast.data.build import (
    EventCollector,
    drop_short_users,
    match_catalog,
    sort_events,
    to_interactions,
)
from r2ec_fast.data.items import clean_items, load_items, resolve_columns, unique_items
from r2ec_fast.data.reader import (
    ReadStats,
    TextFormat,
    add_read_lines,
    column_names,
    guess_format,
    read_blocks,
)
from r2ec_fast.data.report import LoadReport
from r2ec_fast.data.sources.movielens import find_movielens
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
    path: str | Path,
    *,
    items: str | Path | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    min_user_events: int = 2,
    min_rating: float | None = None,
    rating_range: tuple[float, float] = (0.0, float("inf")),
    repeats: str = "keep",
    k_core: int = 0,
    start: str | None = None,
    end: str | None = None,
    min_items: int = 0,
    rollback_months: int = 3,
    missing_text: str = "drop",
    keep_unused_items: bool | None = None,
    quote: str | None = "auto",
    truncated: str = "refuse",
) -> InteractionData:
    """Read interactions and item text.

    Nothing is dropped or changed silently: `data.report.to_text()` shows every rule and its count.

    Args:
        path: a CSV, TSV, JSON Lines or Parquet file (also .gz), a RecBole .inter file, a MovieLens
            directory, or a file of sequences (a line: user, then item ids, oldest first).
        items: the item table, any of the table formats. None: a RecBole .item file beside `path`
            or MovieLens' own is used; else every item's title is its id, and the report says so.
        format: one of "auto" (by name), "csv", "tsv", "jsonl", "parquet", "recbole", "movielens",
            "sequences".
        columns: our name (user_id, item_id, timestamp, rating) -> the file's name, where the known
            aliases (userId, movieId, weight, datetime, ...) do not fit.
        item_columns: the same for the item table (item_id, title, description, average_rating,
            rating_number, genres, brand, price, categories); other names become text columns.
        min_user_events: users with fewer events are dropped (2: a user needs something to predict).
        min_rating: events rated lower, or not rated, are dropped; None keeps all.
        rating_range: (lowest, highest) valid rating; the event of an invalid one stays, unrated.
        repeats: "keep" all events of a user with one item, or only the "first" or "last".
        k_core: iterative k-core of users and items (in the window); 0 or 1 is off.
        start, end: keep the events in [start, end), ISO text such as "2022-10-01"; None is open.
        min_items: move `start` back while fewer items than this have events.
        rollback_months: by how many months at a time.
        missing_text: items of events without a row or title in the table: "drop" them with their
            events, "refuse" the data, or "use_id" as their title.
        keep_unused_items: whether catalog items without events stay; None: only
            without a k-core, which says that they do not.
        quote: the quote character of CSV; None: quotes are ordinary; "auto": '"' in CSV, none else.
        truncated: a gzip file which stops early: "refuse", or "keep" the rows before the break.

    Returns:
        InteractionData; ids are text; users and items are numbered in text order of their ids.

    Raises:
        FileNotFoundError, ValueError: naming the argument, what was expected and what came.
    """
    path = Path(path)
    kind = _kind(path, format)
    report = LoadReport(source=path.name)
    collector = EventCollector(report, rating_range=rating_range, min_rating=min_rating)
    layout = find_movielens(path) if kind == "movielens" else None
    if kind == "sequences":
        _collect_sequences(path, collector, truncated)
    else:
        place, form = (layout.events, layout.event_form) if layout else (path, None)
        form = form or _form(path, kind, quote)
        _collect_table(place, form, collector, columns, kind == "recbole", truncated)
    events = collector.finish()
    sort_events(events, report, repeats=repeats)
    events.stage(report, "duplicates and rating rules")

    if items is None and kind == "recbole" and path.with_suffix(".item").exists():
        items = path.with_suffix(".item")
    if items is not None:
        table = _read_items(Path(items), quote, report, item_columns, truncated)
    elif layout is not None:
        table = unique_items(clean_items(layout.read_items(report), report), report)
    else:
        table = pl.DataFrame({"item_id": events.item_ids, "title": events.item_ids})
        report.add("item without item table", table.height, "changed", "its id is its title")
    table = match_catalog(events, table, report, missing_text=missing_text)
    events.stage(report, "item text")
    cut_window(
        events,
        report,
        start=start,
        end=end,
        min_items=min_items,
        rollback_months=rollback_months,
        k_core=k_core,
    )
    if min_user_events > 1:
        drop_short_users(events, report, min_user_events)
        events.stage(report, f"users with >= {min_user_events} events")
    keep = k_core < 2 if keep_unused_items is None else keep_unused_items
    if not keep:
        used = events.item_ids.gather(np.unique(events.item))
        table = table.filter(pl.col("item_id").is_in(used.implode()))
    return to_interactions(events, table, report)


def _read_items(
    path: Path,
    quote: str | None,
    report: LoadReport,
    item_columns: Mapping[str, str] | None,
    truncated: str,
) -> pl.DataFrame:
    form = _form(path, "auto", quote)
    names = _recbole_names(column_names(path, form)) if path.suffix == ".item" else None
    return load_items(
        path, form, report, item_columns=item_columns, names=names, truncated=truncated
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


def _form(path: Path, kind: str, quote: str | None) -> TextFormat:
    if kind == "sequences":
        return TextFormat("lines", quote=None)
    if kind in ("csv", "jsonl", "parquet"):
        form = TextFormat(kind)
    elif kind in ("tsv", "recbole"):
        form = TextFormat("tsv", separator="\t", quote=None)
    else:
        form = guess_format(path)
    return form if quote == "auto" else replace(form, quote=quote)


def _recbole_names(header: list[str]) -> dict[str, str]:
    return {name: name.split(":", 1)[0] for name in header}


def _collect_table(
    path: Path,
    form: TextFormat,
    collector: EventCollector,
    columns: Mapping[str, str] | None,
    typed_header: bool,
    truncated: str,
) -> None:
    header = column_names(path, form)
    plain = [_recbole_names(header)[h] for h in header] if typed_header else header
    found = resolve_columns(plain, EVENT_ALIASES, columns, ("user_id", "item_id"), "columns", path)
    theirs = {ours: header[plain.index(column)] for ours, column in found.items()}
    stats = ReadStats()
    wanted = list(dict.fromkeys(theirs.values()))
    for block in read_blocks(path, wanted, form, stats, truncated=truncated):
        collector.add(block.select([pl.col(c).alias(ours) for ours, c in theirs.items()]))
    add_read_lines(stats, collector.report)


def _collect_sequences(path: Path, collector: EventCollector, truncated: str) -> None:
    stats = ReadStats()
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

"""`load_interactions`: any interaction log -> InteractionData."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl

from r2ec_fast.data.build import (
    EventCollector,
    drop_outside_core,
    drop_short_users,
    match_catalog,
    sort_events,
    to_interactions,
)
from r2ec_fast.data.items import clean_items, load_items, resolve_columns, unique_items
from r2ec_fast.data.movielens import find_movielens
from r2ec_fast.data.reader import (
    ReadStats,
    TextFormat,
    add_read_lines,
    column_names,
    guess_format,
    read_blocks,
)
from r2ec_fast.data.report import LoadReport
from r2ec_fast.data.types import InteractionData

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
    missing_text: str = "drop",
    keep_unused_items: bool = True,
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
        k_core: iterative k-core of users and items; 0 or 1 is off.
        missing_text: items of events without a row or title in the table: "drop" them with their
            events, "refuse" the data, or "use_id" as their title.
        keep_unused_items: whether catalog items without events stay.
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
    item_names: dict[str, str] | None = None
    item_form: TextFormat | None = None
    if kind == "movielens":
        layout = find_movielens(path)
        event_path, event_form, default_items = layout.events, layout.event_form, layout.items
        item_form = layout.item_form
    else:
        event_path, event_form = path, _form(path, kind, quote)
        default_items = path.with_suffix(".item") if kind == "recbole" else None
    if kind == "sequences":
        _collect_sequences(event_path, collector, truncated)
    else:
        _collect_table(event_path, event_form, collector, columns, kind == "recbole", truncated)
    events = collector.finish()
    sort_events(events, report, repeats=repeats)
    events.stage(report, "duplicates and rating rules")

    if items is None and default_items is not None and default_items.exists():
        items = default_items
    elif items is not None:
        item_form = None
    if items is None:
        table = pl.DataFrame({"item_id": events.item_ids, "title": events.item_ids})
        report.add("item without item table", table.height, "changed", "its id is its title")
    elif kind == "movielens" and item_form is not None:
        table = unique_items(clean_items(layout.read_items(report), report), report)
    else:
        form = _form(Path(items), "auto", quote)
        if str(items).endswith(".item"):
            item_names = _recbole_names(column_names(items, form))
        table = load_items(
            items,
            form,
            report,
            item_columns=item_columns,
            names=item_names,
            truncated=truncated,
        )
    table = match_catalog(
        events, table, report, missing_text=missing_text, keep_unused=keep_unused_items
    )
    events.stage(report, "item text")
    if k_core > 1:
        drop_outside_core(events, report, k_core)
        events.stage(report, f"{k_core}-core")
    if min_user_events > 1:
        drop_short_users(events, report, min_user_events)
        events.stage(report, f"users with >= {min_user_events} events")
    return to_interactions(events, table, report)


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

"""Amazon Reviews 2023 as the paper prepares it, at full size.

Reviews are read in blocks into numbers; metadata is read once, and the rows that may be needed are
put aside on disk. So memory follows the number of reviews (about 150 bytes each at the peak), not
the size of texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from r2ec_fast.data.blocks import ReadStats
from r2ec_fast.data.build import (
    CodedEvents,
    EventCollector,
    drop_outside_core,
    drop_short_users,
    pad_asins,
    sort_events,
    to_interactions,
)
from r2ec_fast.data.categories import AMAZON_CATEGORIES
from r2ec_fast.data.columns import drop_nested_ids, our_columns
from r2ec_fast.data.formats import TextFormat, guess_format
from r2ec_fast.data.items import clean_items, resolve_columns, unique_items
from r2ec_fast.data.parse import parse_ids, parse_numbers, parse_prices
from r2ec_fast.data.progress import reading
from r2ec_fast.data.reader import add_read_lines, column_names, detect_format, read_blocks
from r2ec_fast.data.report import LoadReport
from r2ec_fast.data.settings import EventRules
from r2ec_fast.data.text import clean_column
from r2ec_fast.data.types import InteractionData
from r2ec_fast.data.window import cut_window

AMAZON_URL = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023"
REVIEWS_URL = "benchmark/5core/rating_only/{category}.csv.gz"
METADATA_URL = "raw/meta_categories/meta_{category}.jsonl.gz"
ITEM_STATISTICS = ("catalog", "window_start", "none")
_EVENT_COLUMNS = {
    "user_id": ("user_id",),
    "item_id": ("parent_asin", "asin"),
    "timestamp": ("timestamp", "sort_timestamp", "sortTimestamp"),
    "rating": ("rating",),
}
_BENCHMARK_COLUMNS = {"user_id", "parent_asin", "rating", "timestamp", "history"}
_META_COLUMNS = {
    "item_id": ("parent_asin", "asin"),
    "title": ("title",),
    "price": ("price",),
    "average_rating": ("average_rating",),
    "rating_number": ("rating_number",),
    "description": ("description",),
}


@dataclass(frozen=True)
class AmazonRules(EventRules):
    """The paper's rules as settings; the defaults are the paper's.

    The window's start moves back until the first year of the data. Words of a title are the pieces
    between single spaces of the raw title. The k-core over all time goes before anything else,
    after the earliest event of each (user, item) was taken. The paper keeps users with one event:
    they are no examples, but their items are in the catalog.

    Args:
        start: first day of the window.
        end: first day after the window.
        min_items: the window's start moves back until this many items have events.
        rollback_months: by this many months at a time.
        max_title_words: items with more words in the title are dropped.
        require_price: items without a readable price are dropped.
        history_k_core: k-core over all time; None: 5 for raw reviews, 0 for benchmark files
            (no other columns than user_id, parent_asin, rating, timestamp), which are 5-core.
        k_core: iterative k-core within the window; 0 is off.
        min_user_events: users with fewer events in the window are dropped; 1 as the paper.
        item_statistics: average_rating and rating_number as the "catalog" has them (the paper; may
            know the test time), from the reviews before the window ("window_start"), or "none".
    """

    start: str = "2022-10-01"
    end: str = "2023-10-01"
    min_items: int = 10_000
    min_user_events: int = 1
    max_title_words: int = 20
    require_price: bool = True
    history_k_core: int | None = None
    item_statistics: str = "catalog"

    def __post_init__(self) -> None:
        if self.item_statistics not in ITEM_STATISTICS:
            raise ValueError(
                f"item_statistics: expected one of {ITEM_STATISTICS}, got {self.item_statistics!r}"
            )
        if self.max_title_words < 1:
            raise ValueError(f"max_title_words: expected >= 1, got {self.max_title_words}")


@dataclass
class AmazonData:
    """What `load_amazon` returns: the data, the window's start (unix seconds), the files read."""

    data: InteractionData
    start: int | None
    sources: list[ReadStats]


def amazon_urls(category: str, base_url: str = AMAZON_URL) -> tuple[str, str]:
    """Addresses of a category's reviews (5-core benchmark) and metadata.

    Raises ValueError for a name that is none of the 33 categories.
    """
    if category not in AMAZON_CATEGORIES:
        raise ValueError(
            f"category: {category!r} is no category of Amazon Reviews 2023; expected one of "
            f"{', '.join(AMAZON_CATEGORIES)}"
        )
    base = base_url.rstrip("/")
    return (
        f"{base}/{REVIEWS_URL.format(category=category)}",
        f"{base}/{METADATA_URL.format(category=category)}",
    )


def load_amazon(
    reviews: str | Path,
    metadata: str | Path,
    work_dir: str | Path,
    rules: AmazonRules | None = None,
    *,
    truncated: str = "refuse",
    progress: bool = False,
) -> AmazonData:
    """Apply the paper's rules to a review file and a metadata file.

    Args:
        reviews: raw reviews or a rating_only table; .csv, .jsonl (each also .gz) or .parquet.
        metadata: raw item metadata, the same formats.
        work_dir: an existing directory for rows put aside; the caller removes it.
        rules: the settings.
        truncated: a gzip file that stops early: "refuse", or "keep" the rows before the break.
        progress: show a bar on stderr while reading.

    Raises:
        FileNotFoundError, ValueError: naming the argument, what was expected and what came.
    """
    rules = rules or AmazonRules()
    report = LoadReport(source=f"{Path(reviews).name} + {Path(metadata).name}")
    review_stats, meta_stats = ReadStats(), ReadStats()
    events = _read_reviews(Path(reviews), rules, report, review_stats, truncated, progress)
    parts = _put_aside(
        Path(metadata), events, rules, report, meta_stats, truncated, progress, Path(work_dir)
    )
    valid = _valid_items(parts, events)
    gone = events.keep(valid[events.item])
    report.add("event of an item dropped or without row", gone, "dropped", "items need text")
    if not len(events.user):
        raise ValueError(
            f"metadata: no event's item has usable metadata in {metadata}; "
            f"the reviews have ids like {events.item_ids[0]!r}\n{report.to_text()}"
        )
    events.stage(report, "item rules")
    everything = (events.item, events.time, events.rating)
    start = cut_window(events, report, rules)
    drop_short_users(events, report, rules.min_user_events)
    table = _item_table(parts, events, report)
    table = _with_statistics(table, events, everything, start, rules, report)
    return AmazonData(to_interactions(events, table, report), start, [review_stats, meta_stats])


def _read_reviews(
    path: Path,
    rules: AmazonRules,
    report: LoadReport,
    stats: ReadStats,
    truncated: str,
    progress: bool,
) -> CodedEvents:
    form = _form(path, _EVENT_COLUMNS, "user_id", "item_id")
    header = column_names(path, form)
    found = resolve_columns(header, _EVENT_COLUMNS, None, tuple(_EVENT_COLUMNS), "reviews", path)
    collector = EventCollector(
        report, rating_range=(1.0, 5.0), min_rating=rules.min_rating, amazon_ids=True
    )
    stats.id_columns = (found["user_id"], found["item_id"])
    stats.id_columns = (found["item_id"],)
    blocks = read_blocks(path, list(found.values()), form, stats, truncated=truncated)
    for block in reading(blocks, path, stats, progress):
        rows = our_columns(block, found, path)
        collector.add(drop_nested_ids(rows, "event", report) if form.kind == "jsonl" else rows)
    add_read_lines(stats, report)
    events = collector.finish()
    sort_events(events, report, repeats="first")
    events.stage(report, "duplicates and rating rules")
    k = rules.history_k_core
    if k is None:
        k = 0 if set(header) <= _BENCHMARK_COLUMNS else 5
    if k > 1:
        drop_outside_core(events, report, k)
        events.stage(report, f"{k}-core over all time")
    return events


def _form(path: Path, columns: Mapping[str, tuple[str, ...]], *needed: str) -> TextFormat:
    """The format of a file, by its content first."""

    def is_header(names: Sequence[str]) -> bool:
        return all(set(columns[ours]).intersection(names) for ours in needed)

    return detect_format(path, guess_format(path), is_header)


def _put_aside(
    path: Path,
    events: CodedEvents,
    rules: AmazonRules,
    report: LoadReport,
    stats: ReadStats,
    truncated: str,
    progress: bool,
    work_dir: Path,
) -> list[Path]:
    """Write the usable metadata rows of items with events to Parquet parts; count the others."""
    form = _form(path, _META_COLUMNS, "item_id", "title")
    header = column_names(path, form)
    required = ("item_id", "title", "price") if rules.require_price else ("item_id", "title")
    found = resolve_columns(header, _META_COLUMNS, None, required, "metadata", path)
    if form.kind == "jsonl" and "description" in found:
        form = TextFormat("jsonl", list_columns=frozenset([found["description"]]))
    wanted = pl.DataFrame({"item_id": events.item_ids.gather(np.unique(events.item))})
    parts: list[Path] = []
    seen: list[pl.Series] = []
    stats.id_columns = (found["item_id"],)
    blocks = read_blocks(path, list(found.values()), form, stats, truncated=truncated)
    for block in reading(blocks, path, stats, progress):
        rows = our_columns(block, found, path)
        ids = pad_asins(parse_ids(rows["item_id"]), report).alias("item_id")
        rows = rows.with_columns(ids)
        rows = rows.join(wanted, on="item_id", how="semi")
        unused = block.height - rows.height
        report.add("metadata row of an item without events", unused, "dropped", "not needed")
        seen.append(rows["item_id"].unique())
        rows = _usable(rows, rules, report)
        if rows.height:
            part = work_dir / f"items-{len(parts):06d}.parquet"
            rows.drop("price", strict=False).write_parquet(part, compression="zstd")
            parts.append(part)
    add_read_lines(stats, report)
    absent = wanted.height - (pl.concat(seen).n_unique() if seen else 0)
    report.add("item without metadata row", absent, "dropped", "items need text")
    return parts


def _usable(rows: pl.DataFrame, rules: AmazonRules, report: LoadReport) -> pl.DataFrame:
    """The paper's item rules, in the reference's order: each row counts under its first fault."""
    title = pl.col("title")
    rows = _drop(rows, title.is_null(), "item row without title", "items need a title", report)
    readable = clean_column(rows["title"], LoadReport(), max_chars=1, strip_tags=True)
    rows = rows.with_columns(readable.is_null().alias("blank"))
    what = "item row with a blank title"
    rows = _drop(rows, pl.col("blank"), what, "no character to read", report).drop("blank")
    rows = _drop(
        rows,
        title.str.contains("<span id", literal=True),
        "item row with page markup as title",
        "the title holds '<span id'",
        report,
    )
    rows = _drop(
        rows,
        title.str.count_matches(" ", literal=True) + 1 > rules.max_title_words,
        "item row with a long title",
        f"more than {rules.max_title_words} words",
        report,
    )
    if not rules.require_price:
        return rows
    price = parse_prices(rows["price"])
    number = parse_numbers(rows["price"])
    report.add(
        "price with a currency sign or commas",
        (price.is_not_null() & number.is_null()).sum(),
        "kept",
        "read as a number",
    )
    return _drop(
        rows.with_columns(price.alias("price")),
        pl.col("price").is_null(),
        "item row without a readable price",
        "none, or no number",
        report,
    )


def _drop(
    rows: pl.DataFrame, fault: pl.Expr, what: str, rule: str, report: LoadReport
) -> pl.DataFrame:
    fault = fault.fill_null(False)
    good = rows.filter(~fault)
    report.add(what, rows.height - good.height, "dropped", rule)
    return good


def _valid_items(parts: list[Path], events: CodedEvents) -> np.ndarray:
    """[I] bool: which item codes have a usable metadata row."""
    if not parts:
        return np.zeros(len(events.item_ids), dtype=bool)
    ids = pl.concat([pl.read_parquet(part, columns=["item_id"]) for part in parts])
    return events.item_ids.is_in(ids["item_id"].unique().implode()).to_numpy()


def _item_table(parts: list[Path], events: CodedEvents, report: LoadReport) -> pl.DataFrame:
    wanted = pl.DataFrame({"item_id": events.item_ids.gather(np.unique(events.item))})
    chosen = [pl.read_parquet(part).join(wanted, on="item_id", how="semi") for part in parts]
    rows = pl.concat(chosen, how="vertical_relaxed")
    if "description" in rows.columns and isinstance(rows["description"].dtype, pl.List):
        # In the file's order, each paragraph once: the reference takes Python's set order.
        rows = rows.with_columns(pl.col("description").list.unique(maintain_order=True))
    return unique_items(clean_items(rows, report, strip_tags=True), report).sort("item_id")


def _with_statistics(
    table: pl.DataFrame,
    events: CodedEvents,
    everything: tuple[np.ndarray, np.ndarray, np.ndarray],
    start: int | None,
    rules: AmazonRules,
    report: LoadReport,
) -> pl.DataFrame:
    names = ["average_rating", "rating_number"]
    if rules.item_statistics == "catalog":
        report.add(
            "item with the catalog's rating statistics",
            table.height,
            "kept",
            "Amazon's at the crawl: may know ratings of the test time, as in the paper",
        )
        return table
    table = table.drop(names, strict=False)
    if rules.item_statistics == "none":
        return table
    item, time, rating = everything
    before = (time < (start or 0) * 1000) & np.isfinite(rating)
    size = len(events.item_ids)
    count = np.bincount(item[before], minlength=size)
    total = np.bincount(item[before], weights=rating[before], minlength=size)
    mean = np.divide(total, count, out=np.full(size, np.nan), where=count > 0)
    codes = np.unique(events.item)  # the order of `table`: both are sorted by id
    report.add(
        "item without a rating before the window",
        int((count[codes] == 0).sum()),
        "kept",
        "average_rating missing, rating_number 0",
    )
    return table.with_columns(
        pl.Series("average_rating", np.round(mean[codes], 1)).fill_nan(None),
        pl.Series("rating_number", count[codes], dtype=pl.Int64),
    )

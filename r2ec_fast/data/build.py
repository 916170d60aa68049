"""Rows -> coded events -> filters -> InteractionData. Memory: about 150 bytes a row at the peak."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from r2ec_fast.data.parse import DATE_MIX, parse_ids, parse_numbers, read_times
from r2ec_fast.data.report import LoadReport
from r2ec_fast.data.types import Catalog, IdMap, InteractionData

CODE_ROWS = 4_000_000
LARGEST_RATING = float(np.finfo(np.float32).max)
MISSING_WORDS = ("nan", "none", "null", "n/a", "na", "<na>", "undefined")
REPEATS = ("keep", "first", "last")
MISSING_TEXT = ("drop", "refuse", "use_id")


@dataclass
class CodedEvents:
    """Events with ids as numbers; codes follow the text order of the external ids.

    Args:
        user_ids, item_ids: external ids, sorted; position = code.
        user, item: [E] uint32 codes.
        time: [E] int64 milliseconds, or the row number where the source has no times.
        rating: [E] float32, NaN where missing.
        has_time, has_rating: whether the source has them.
    """

    user_ids: pl.Series
    item_ids: pl.Series
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    rating: np.ndarray
    has_time: bool
    has_rating: bool

    def keep(self, mask: np.ndarray) -> int:
        """Drop the events where `mask` is False; returns how many went."""
        dropped = int(len(mask) - np.count_nonzero(mask))
        if dropped:
            for name in ("user", "item", "time", "rating"):
                setattr(self, name, getattr(self, name)[mask])
        return dropped

    def stage(self, report: LoadReport, name: str) -> None:
        """Enter the present sizes into the report."""
        users = np.count_nonzero(np.bincount(self.user, minlength=1))
        items = np.count_nonzero(np.bincount(self.item, minlength=1))
        report.add_stage(name, len(self.user), users, items)


class EventCollector:
    """Takes frames of raw columns, drops unusable rows, returns CodedEvents.

    Args:
        report: gets the counts.
        rating_range: (lowest, highest) valid rating; outside: the rating becomes missing.
        min_rating: events rated below are dropped; None keeps all.
    """

    def __init__(
        self,
        report: LoadReport,
        *,
        rating_range: tuple[float, float] = (0.0, float("inf")),
        min_rating: float | None = None,
        amazon_ids: bool = False,
    ) -> None:
        self.report = report
        self.rating_range = rating_range
        self.min_rating = min_rating
        self.amazon_ids = amazon_ids
        self.frames: list[pl.DataFrame] = []
        self.rows = 0
        self.has_time = self.has_rating = False
        self.dates: bool | None = None  # whether the times are dates of digits alone

    def add(self, frame: pl.DataFrame) -> None:
        """Take a frame of user_id, item_id and, where the source has them, timestamp, rating."""
        out = [parse_ids(frame["user_id"]).alias("user"), self._items(frame["item_id"])]
        self.has_time = "timestamp" in frame.columns
        self.has_rating = "rating" in frame.columns
        if self.has_time:
            time = self._times(frame["timestamp"])
        else:
            time = pl.int_range(self.rows, self.rows + frame.height, dtype=pl.Int64, eager=True)
        out.append(time.alias("time"))
        out.append(self._ratings(frame).alias("rating"))
        self.rows += frame.height
        table = pl.DataFrame(out)
        table = self._require(table, "user", "event without user id")
        table = self._require(table, "item", "event without item id")
        table = self._require(table, "time", "event without readable time")
        if self.min_rating is not None:
            good = table["rating"].is_not_nan() & (table["rating"] >= self.min_rating)
            rule = f"rating below {self.min_rating:g} or missing"
            self.report.add("event under the rating threshold", (~good).sum(), "dropped", rule)
            table = table.filter(good)
        self.frames.append(table)

    def finish(self) -> CodedEvents:
        """Code the ids and hand over the events; raises ValueError if none is left."""
        frames, self.frames = self.frames, []
        if not sum(frame.height for frame in frames):
            found = "; ".join(f"{x.what}: {x.count:,}" for x in self.report.lines if x.count)
            raise ValueError(
                f"path: no usable event among {self.rows:,} rows ({found or 'there are no rows'})"
            )
        user_ids, user = _code(frames, "user")
        item_ids, item = _code(frames, "item")
        rest = pl.concat(frames)
        for name, ids, codes in (("user", user_ids, user), ("item", item_ids, item)):
            word = ids.str.to_lowercase().is_in(MISSING_WORDS).to_numpy()
            count = int(word[codes].sum()) if word.any() else 0
            rule = "only an empty value, JSON null or NaN is no id"
            what = f"event whose {name} id is a word for missing (nan, None, NULL)"
            self.report.add(what, count, "kept", rule)
        self.report.add_stage("reading", len(user), len(user_ids), len(item_ids))
        return CodedEvents(
            user_ids=user_ids,
            item_ids=item_ids,
            user=user,
            item=item,
            time=rest["time"].to_numpy(),
            rating=rest["rating"].to_numpy(),
            has_time=self.has_time,
            has_rating=self.has_rating,
        )

    def _items(self, column: pl.Series) -> pl.Series:
        ids = parse_ids(column)
        if self.amazon_ids:
            ids = pad_asins(ids, self.report)
        return ids.alias("item")

    def _times(self, column: pl.Series) -> pl.Series:
        time, dates = read_times(column)
        if dates is not None and self.dates not in (None, dates):  # an earlier block's
            raise ValueError(f"timestamp: the column {DATE_MIX}")
        self.dates = self.dates if dates is None else dates
        return time

    def _ratings(self, frame: pl.DataFrame) -> pl.Series:
        if not self.has_rating:
            return pl.select(pl.repeat(float("nan"), frame.height, dtype=pl.Float32)).to_series()
        raw = frame["rating"]
        value = parse_numbers(raw)
        if raw.dtype == pl.String and value.null_count() > raw.null_count():
            truth = raw.str.strip_chars().str.to_lowercase()
            value = value.set((truth == "true").fill_null(False), 1.0)
            value = value.set((truth == "false").fill_null(False), 0.0)
        given = raw.is_not_null() if raw.dtype.is_numeric() else (raw.str.strip_chars() != "")
        bad = int((value.is_null() & given.fill_null(False)).sum())
        self.report.add("rating unreadable", bad, "changed", "event kept, rating missing")
        low, high = self.rating_range
        outside = ((value < low) | (value > min(high, LARGEST_RATING))).fill_null(False)
        self.report.add(
            "rating out of range",
            outside.sum(),
            "changed",
            f"event kept, rating outside {low:g}..{high:g} missing",
        )
        return value.set(outside, None).fill_null(float("nan")).cast(pl.Float32)

    def _require(self, table: pl.DataFrame, column: str, what: str) -> pl.DataFrame:
        missing = int(table[column].null_count())
        rule = "the row cannot be placed"
        self.report.add(what, missing, "dropped", rule)
        return table.filter(pl.col(column).is_not_null()) if missing else table


def pad_asins(ids: pl.Series, report: LoadReport) -> pl.Series:
    """Amazon ids have ten characters: a shorter all-digit id gets its leading zeros back."""
    short = (ids.str.contains(r"^\d+$") & (ids.str.len_chars() < 10)).fill_null(False)
    report.add(
        "item id read as a number", short.sum(), "changed", "leading zeros restored to 10 digits"
    )
    return ids.set(short, None).fill_null(ids.str.zfill(10)) if short.any() else ids


def sort_events(events: CodedEvents, report: LoadReport, *, repeats: str = "keep") -> None:
    """Order by (user, time, item); drop exact duplicates and, if asked, repeated items of a user.

    Args:
        events: changed in place.
        report: gets the counts.
        repeats: "keep" every event; "first" or "last" of each (user, item) only.
    """
    if repeats not in REPEATS:
        raise ValueError(f"repeats: expected one of {REPEATS}, got {repeats!r}")
    # Of events that differ in rating alone the best rated comes first, and is the one that stays.
    rating = np.nan_to_num(-events.rating, nan=np.inf)
    order = np.lexsort((rating, events.item, events.time, events.user))
    for name in ("user", "item", "time", "rating"):
        setattr(events, name, getattr(events, name)[order])
    if events.has_time:
        same = np.zeros(len(events.user), dtype=bool)
        same[1:] = (
            (events.user[1:] == events.user[:-1])
            & (events.item[1:] == events.item[:-1])
            & (events.time[1:] == events.time[:-1])
        )
        report.add(
            "duplicate event",
            events.keep(~same),
            "dropped",
            "same user, item and time; the highest rating stays",
        )
        seconds = events.time // 1000
        ties = (events.user[1:] == events.user[:-1]) & (seconds[1:] == seconds[:-1])
        report.add(
            "event in the same second as the one before",
            np.count_nonzero(ties),
            "kept",
            "ordered by full time, then item id",
        )
    if repeats != "keep":
        pair = events.user.astype(np.uint64) << np.uint64(32) | events.item.astype(np.uint64)
        by_pair = np.argsort(pair, kind="stable")
        pair = pair[by_pair]
        edge = np.ones(len(pair), dtype=bool)
        if repeats == "first":
            edge[1:] = pair[1:] != pair[:-1]
        else:
            edge[:-1] = pair[1:] != pair[:-1]
        mask = np.zeros(len(pair), dtype=bool)
        mask[by_pair[edge]] = True
        report.add(
            "repeated item of a user", events.keep(mask), "dropped", f"the {repeats} event stays"
        )


def drop_outside_core(
    events: CodedEvents, report: LoadReport, k: int, *, allow_empty: bool = False
) -> None:
    """Drop users and items with fewer than `k` events, again and again until none is left."""
    if k < 0:
        raise ValueError(f"k_core: expected >= 0, got {k}")
    if k < 2:
        return
    dropped = rounds = 0
    while len(events.user):
        users = np.bincount(events.user)
        items = np.bincount(events.item)
        mask = (users[events.user] >= k) & (items[events.item] >= k)
        gone = events.keep(mask)
        if not gone:
            break
        dropped += gone
        rounds += 1
    rule = f"users and items with at least {k} events, {rounds} rounds"
    report.add(f"event outside the {k}-core", dropped, "dropped", rule)
    if not len(events.user) and not allow_empty:
        raise ValueError(f"k_core: no event is left of the {k}-core; choose a smaller k")


def drop_short_users(events: CodedEvents, report: LoadReport, min_events: int) -> None:
    """Drop users with fewer than `min_events` events; below 2 there are none."""
    if min_events < 2:
        return
    counts = np.bincount(events.user)
    users = int(np.count_nonzero((counts > 0) & (counts < min_events)))
    gone = events.keep(counts[events.user] >= min_events)
    rule = f"users with fewer than {min_events} events"
    report.add("user with too few events", users, "dropped", rule)
    report.add("event of a user with too few events", gone, "dropped", rule)
    if not len(events.user):
        raise ValueError(f"min_user_events: no user has {min_events} events")
    events.stage(report, f"users with >= {min_events} events")


def match_catalog(
    events: CodedEvents,
    table: pl.DataFrame,
    report: LoadReport,
    *,
    missing_text: str = "drop",
) -> pl.DataFrame:
    """Join events to a cleaned item table (see `unique_items`); returns the catalog's rows.

    Events whose item has no row or no title go by `missing_text`: "drop" them (counted), "refuse"
    (ValueError naming an item), or "use_id" (the id is the title).
    """
    if missing_text not in MISSING_TEXT:
        raise ValueError(f"missing_text: expected one of {MISSING_TEXT}, got {missing_text!r}")
    used = np.zeros(len(events.item_ids), dtype=bool)
    used[events.item] = True
    seen = pl.DataFrame({"item_id": events.item_ids.filter(pl.Series(used))})
    absent = seen.join(table, on="item_id", how="anti")["item_id"].sort()
    blank = table.filter(pl.col("title").is_null())["item_id"].sort()
    if missing_text == "refuse" and len(absent) + len(blank):
        if len(absent):
            raise ValueError(
                f"items: {len(absent):,} items of the events are not in the item table, "
                f"e.g. {absent[0]!r}; missing_text='drop' or 'use_id' allows them"
            )
        raise ValueError(
            f"items: {len(blank):,} items have no title, e.g. {blank[0]!r}; "
            "missing_text='drop' or 'use_id' allows them"
        )
    if missing_text == "use_id":
        extra = pl.DataFrame({"item_id": absent, "title": absent})
        table = pl.concat([table, extra], how="diagonal")
        table = table.with_columns(pl.col("title").fill_null(pl.col("item_id")))
        report.add("item not in the item table", len(absent), "changed", "its id is its title")
        report.add("item without title", len(blank), "changed", "its id is its title")
    else:
        table = table.filter(pl.col("title").is_not_null())
        report.add("item not in the item table", len(absent), "dropped", "items need text")
        report.add("item without title", len(blank), "dropped", "items need a title")
    known = events.item_ids.is_in(table["item_id"].implode()).to_numpy()
    gone = events.keep(known[events.item])
    report.add("event of an item without text", gone, "dropped", "its item was dropped")
    if not len(events.user):
        raise ValueError(
            "items: no event's item is in the item table; events have ids like "
            f"{events.item_ids[0]!r}, the table has ids like {table['item_id'].head(1).to_list()}"
        )
    return table.sort("item_id")


def to_interactions(
    events: CodedEvents, table: pl.DataFrame, report: LoadReport
) -> InteractionData:
    """Freeze events (already ordered) and catalog rows (sorted by item_id) into InteractionData."""
    ids = table["item_id"]
    code = pl.DataFrame({"item_id": ids, "internal": np.arange(len(ids), dtype=np.int64)})
    lookup = (
        pl.DataFrame({"item_id": events.item_ids})
        .join(code, on="item_id", how="left", maintain_order="left")["internal"]
        .fill_null(-1)
        .to_numpy()
    )
    counts = np.bincount(events.user, minlength=len(events.user_ids))
    used = counts > 0
    offsets = np.zeros(int(used.sum()) + 1, dtype=np.int64)
    np.cumsum(counts[used], out=offsets[1:])
    has_rating = events.has_rating and bool(np.isfinite(events.rating).any())
    return InteractionData(
        users=IdMap(events.user_ids.filter(pl.Series(used)).to_list()),
        catalog=Catalog(IdMap(ids.to_list()), table.drop("item_id")),
        offsets=offsets,
        item=lookup[events.item],
        timestamp=events.time // 1000 if events.has_time else None,
        rating=np.ascontiguousarray(events.rating) if has_rating else None,
        report=report,
    )


def _code(frames: list[pl.DataFrame], name: str) -> tuple[pl.Series, np.ndarray]:
    """Sorted distinct ids, and every row's position among them; frees the text column."""
    ids = pl.concat([frame[name].unique() for frame in frames]).unique().sort()
    table = pl.DataFrame({name: ids, "code": np.arange(len(ids), dtype=np.uint32)})
    codes = np.empty(sum(frame.height for frame in frames), dtype=np.uint32)
    start = first = 0
    while first < len(frames):
        last, rows = first, 0
        while last < len(frames) and rows < CODE_ROWS:  # the table of ids is hashed once a group
            rows += frames[last].height
            last += 1
        group = pl.DataFrame({name: pl.concat([f[name] for f in frames[first:last]])})
        part = group.join(table, on=name, how="left", maintain_order="left")
        codes[start : start + rows] = part["code"].to_numpy()
        start += rows
        frames[first:last] = [frame.drop(name) for frame in frames[first:last]]
        first = last
    return ids, codes

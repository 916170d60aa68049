"""A time window whose start moves back until the catalog is large enough."""

from __future__ import annotations

import datetime as dt

import numpy as np

from r2ec_fast.data.build import CodedEvents, drop_outside_core
from r2ec_fast.data.parse import parse_time
from r2ec_fast.data.report import LoadReport
from r2ec_fast.data.settings import EventRules


def cut_window(events: CodedEvents, report: LoadReport, rules: EventRules) -> int | None:
    """Keep the events in [start, end); move `start` back while there are too few items.

    As the reference: while fewer than `min_items` items have events, start goes back by
    `rollback_months`, until its year is the first year of the data.

    Args:
        events: changed in place.
        report: gets the counts and a stage per start.
        rules: the window and the k-core inside it.

    Returns:
        The start used, unix seconds, or None if `start` was None.

    Raises:
        ValueError: data without times, an empty window, or a bad setting.
    """
    if rules.start is None and rules.end is None:
        if rules.k_core > 1:
            drop_outside_core(events, report, rules.k_core)
            events.stage(report, f"{rules.k_core}-core")
        return None
    first, last = _bounds(events, rules)
    total = len(events.user)
    if last is not None:
        late = events.keep(events.time < last * 1000)
        report.add("event at or after the window's end", late, "dropped", f"end {_day(last)}")
    if not len(events.user):
        raise ValueError(f"end: none of the {total:,} events is before {rules.end!r}")
    first, inside = _roll_back(events, report, first, rules)
    early = 0 if first is None else int(np.count_nonzero(events.time < first * 1000))
    if first is not None:
        report.add("event before the window's start", early, "dropped", f"start {_day(first)}")
    if not len(inside.user):
        raise ValueError(
            f"start, end: no event of {total:,} is in [{rules.start!r}, {rules.end!r})"
        )
    if rules.k_core > 1:
        report.add(
            f"event outside the window's {rules.k_core}-core",
            len(events.user) - early - len(inside.user),
            "dropped",
            f"users and items with at least {rules.k_core} events in the window",
        )
    missing = rules.min_items - _items(inside)
    if first is not None and missing > 0:
        reason = "the window reaches the first year of the data"
        report.add("item missing to the wanted number", missing, "noted", reason)
    for name in ("user", "item", "time", "rating"):
        setattr(events, name, getattr(inside, name))
    events.stage(report, "window" if first is None else f"window from {_day(first)}")
    return first


def _bounds(events: CodedEvents, rules: EventRules) -> tuple[int | None, int | None]:
    """Start and end in unix seconds, checked."""
    if not events.has_time:
        raise ValueError("start, end: a time window needs timestamps and this data has none")
    if rules.rollback_months < 1:
        raise ValueError(f"rollback_months: expected >= 1, got {rules.rollback_months}")
    first = None if rules.start is None else parse_time(rules.start, "start")
    last = None if rules.end is None else parse_time(rules.end, "end")
    if first is not None and last is not None and first >= last:
        raise ValueError(f"start: expected a time before end, got {rules.start!r} >= {rules.end!r}")
    return first, last


def _roll_back(
    events: CodedEvents, report: LoadReport, first: int | None, rules: EventRules
) -> tuple[int | None, CodedEvents]:
    """The start at which enough items have events, or the last one tried, and the events then."""
    inside = _inside(events, first, rules.k_core)
    if first is None:
        return first, inside
    oldest = _year(int(events.time.min()) // 1000)
    while _items(inside) < rules.min_items and _year(first) > oldest:
        stage = f"window from {_day(first)} (too few items)"
        report.add_stage(stage, len(inside.user), _users(inside), _items(inside))
        first = _months_back(first, rules.rollback_months)
        inside = _inside(events, first, rules.k_core)
    return first, inside


def _inside(events: CodedEvents, first: int | None, k: int) -> CodedEvents:
    mask = slice(None) if first is None else events.time >= first * 1000
    inside = CodedEvents(
        events.user_ids,
        events.item_ids,
        events.user[mask],
        events.item[mask],
        events.time[mask],
        events.rating[mask],
        events.has_time,
        events.has_rating,
    )
    if k > 1 and len(inside.user):
        drop_outside_core(inside, LoadReport(), k, allow_empty=True)
    return inside


def _months_back(second: int, months: int) -> int:
    moment = dt.datetime.fromtimestamp(second, dt.UTC)
    month = moment.year * 12 + moment.month - 1 - months
    year, month = divmod(month, 12)
    # As calendars do: 31 May minus three months is the last day of February.
    following = dt.date(year + month // 11, (month + 1) % 12 + 1, 1)
    day = min(moment.day, (following - dt.timedelta(days=1)).day)
    return int(moment.replace(year=year, month=month + 1, day=day).timestamp())


def _items(events: CodedEvents) -> int:
    return int(np.count_nonzero(np.bincount(events.item, minlength=1)))


def _users(events: CodedEvents) -> int:
    return int(np.count_nonzero(np.bincount(events.user, minlength=1)))


def _year(second: int) -> int:
    return dt.datetime.fromtimestamp(second, dt.UTC).year


def _day(second: int) -> str:
    return dt.datetime.fromtimestamp(second, dt.UTC).date().isoformat()

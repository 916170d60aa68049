"""Slow, plain versions of what r2ec_fast.data does: the oracles of its tests."""

from __future__ import annotations

import gzip
import html
import json
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path


def plain_time_split(times_by_user: list[list[int]]) -> list[list[tuple[int, int]]]:
    """(user, position) pairs of train, valid, test: all examples by time, cut at 80 and 90%."""
    examples = []
    for user, times in enumerate(times_by_user):
        for position in range(1, len(times)):
            examples.append((times[position], user, position))
    examples.sort()
    total = len(examples)
    bounds = [0, total * 8 // 10, total * 9 // 10, total]
    return [
        [(user, position) for _, user, position in examples[a:b]]
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]


def plain_amazon(
    reviews: Path,
    metadata: Path,
    *,
    start: str,
    end: str,
    min_items: int,
    max_title_words: int = 20,
    k_core: int = 5,
) -> tuple[dict[str, list[tuple[str, int, float]]], dict[str, dict[str, object]]]:
    """The paper's rules, one row at a time: ({user: [(item, ms, rating)]}, {item: fields})."""
    events = []
    for row in _rows(reviews):
        user, item = str(row.get("user_id") or "").strip(), _asin(row.get("parent_asin"))
        stamp = _milliseconds(row.get("timestamp"))
        if not user or not item or stamp is None:
            continue
        rating = float(row["rating"])
        events.append((user, item, stamp, rating if 1 <= rating <= 5 else None))
    events = _core(_earliest(events), k_core)

    reviewed = {e[1] for e in events}
    items: dict[str, list[dict[str, object]]] = {}
    for row in _rows(metadata):
        item, title = _asin(row.get("parent_asin")), row.get("title")
        if item not in reviewed or title is None or "<span id" in title:
            continue
        if not _clean(title) or len(title.split(" ")) > max_title_words:
            continue
        if _price(row.get("price")) is None:
            continue
        paragraphs = list(dict.fromkeys(row["description"]))
        items.setdefault(item, []).append(
            {
                "title": _clean(title),
                "average_rating": row["average_rating"],
                "rating_number": row["rating_number"],
                "description": _clean(" ".join(paragraphs)) or None,
            }
        )
    events = [e for e in events if e[1] in items]
    last = _day_ms(end)
    events = [e for e in events if e[2] < last]
    oldest = datetime.fromtimestamp(min(e[2] for e in events) / 1000, UTC).year
    year, month = int(start[:4]), int(start[5:7])
    while True:
        first = _day_ms(f"{year:04d}-{month:02d}-01")
        inside = [e for e in events if e[2] >= first]
        if len({e[1] for e in inside}) >= min_items or year <= oldest:
            break
        month -= 3
        if month < 1:
            year, month = year - 1, month + 12
    users: dict[str, list[tuple[str, int, float]]] = {}
    for user, item, stamp, rating in sorted(inside, key=lambda e: (e[0], e[2], e[1])):
        users.setdefault(user, []).append((item, stamp, rating))
    used = {e[1] for e in inside}
    chosen = {i: min(rows, key=lambda r: r["title"]) for i, rows in items.items() if i in used}
    return users, chosen


def _rows(path: Path):
    with gzip.open(path) as file:
        for line in file:
            try:
                row = json.loads(line.decode("utf8", errors="replace"))
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _asin(value: object) -> str:
    text = "" if value is None else str(value).strip()
    return text.rjust(10, "0") if text.isdigit() else text


def _milliseconds(value: object) -> int | None:
    if isinstance(value, str):
        try:
            return int(datetime.fromisoformat(value).timestamp() * 1000)
        except ValueError:
            return None
    return value if value > 1e11 else value * 1000


def _day_ms(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def _price(value: object) -> float | None:
    try:
        return float(str(value).replace("$", "").replace(",", ""))
    except ValueError:
        return None


def _clean(text: str) -> str:
    text = re.sub("<[^>]+>", "", html.unescape(text))
    return " ".join(text.split())


def _earliest(events: list) -> list:
    """One event of each (user, item): the earliest; of several then, the best rated."""
    best: dict[tuple[str, str], tuple] = {}
    for event in events:
        key = event[:2]
        rank = (event[2], -(event[3] or 0))
        if key not in best or rank < (best[key][2], -(best[key][3] or 0)):
            best[key] = event
    return list(best.values())


def _core(events: list, k: int) -> list:
    while True:
        users = Counter(e[0] for e in events)
        items = Counter(e[1] for e in events)
        kept = [e for e in events if users[e[0]] >= k and items[e[1]] >= k]
        if len(kept) == len(events):
            return kept
        events = kept

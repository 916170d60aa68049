"""What may be chosen when interactions are read: one frozen value a kind of source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isinf
from typing import Any


@dataclass(frozen=True)
class EventRules:
    """Which events stay. Every rule that drops one is counted in the load report.

    The k-core is that of the window. `min_user_events` is 2 because a user needs one event to learn
    from and one to predict.

    Args:
        min_user_events: users with fewer events are dropped.
        min_rating: events rated lower, or not rated, are dropped; None keeps all.
        k_core: iterative k-core of users and items; 0 is off.
        start: first day of a time window; None is open.
        end: first day after it; None is open.
        min_items: `start` moves back until this many items have events.
        rollback_months: by this many months at a time.
    """

    min_user_events: int = 2
    min_rating: float | None = None
    k_core: int = 0
    start: str | None = None
    end: str | None = None
    min_items: int = 0
    rollback_months: int = 3


@dataclass(frozen=True)
class LoadSettings(EventRules):
    """How an interaction log and its item table are read, beside which events stay.

    "auto" as `format` goes by the file's name, as `quote` it is '"' in CSV and none elsewhere.
    Known aliases (userId, movieId, weight, datetime, ...) need no entry in `columns`. An invalid
    rating goes missing, its event stays. A k-core says that items without events do not stay.

    Args:
        format: "auto", "csv", "tsv", "jsonl", "parquet", "recbole", "movielens" or "sequences".
        columns: our name (user_id, item_id, timestamp, rating) -> the log's name.
        item_columns: our name (item_id, title, description, ...) -> the item table's name; other
            names become text columns.
        rating_range: (lowest, highest) valid rating.
        repeats: "keep" all events of a user with one item, or only the "first" or "last".
        missing_text: items without text: "drop", "refuse" or "use_id".
        keep_unused_items: whether items without events stay in the catalog; None: only
            without a k-core.
        quote: the quote character of CSV; None: quotes are ordinary characters.
        truncated: a gzip file that stops early: "refuse" it, or "keep" the rows before the break.
    """

    format: str = "auto"
    columns: Mapping[str, str] | None = None
    item_columns: Mapping[str, str] | None = None
    rating_range: tuple[float, float] = (0.0, float("inf"))
    repeats: str = "keep"
    missing_text: str = "drop"
    keep_unused_items: bool | None = None
    quote: str | None = "auto"
    truncated: str = "refuse"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; an open end of `rating_range` is None, because JSON has no infinity."""
        values = asdict(self)
        for name in ("columns", "item_columns"):
            values[name] = None if values[name] is None else dict(values[name])
        values["rating_range"] = [None if isinf(bound) else bound for bound in self.rating_range]
        return values

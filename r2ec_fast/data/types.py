"""The typed values a dataset consists of: ids, catalog, histories, events, examples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from r2ec_fast.data.report import LoadReport


class UnknownIdError(KeyError):
    """An external id that the id map does not hold; the message names it."""

    def __str__(self) -> str:
        return str(self.args[0])


class IdMap:
    """External ids (any hashable, usually text) <-> internal ids 0..N-1. Frozen.

    Text finds an integer id by its decimal digits ("42" finds 42, "042" does not).

    Args:
        ids: the external ids; position i is internal id i. A repeated id raises ValueError.
    """

    __slots__ = ("_index", "_ids")

    def __init__(self, ids: Sequence[Hashable]) -> None:
        self._ids = tuple(ids)
        self._index = {external: i for i, external in enumerate(self._ids)}
        if len(self._index) != len(self._ids):
            repeated = next(x for x, count in Counter(self._ids).items() if count > 1)
            raise ValueError(f"ids: every id must occur once, got {repeated!r} more than once")

    @property
    def ids(self) -> tuple[Hashable, ...]:
        """The external ids in internal order."""
        return self._ids

    def encode(self, ids: Sequence[Hashable]) -> np.ndarray:
        """Internal ids [n] int64 of external `ids`; UnknownIdError names the first unknown."""
        if isinstance(ids, str):
            raise TypeError(
                f"ids: expected a sequence of ids, got the text {ids!r}; pass [{ids!r}]"
            )
        try:
            return np.fromiter((self._index[self._known(x)] for x in ids), dtype=np.int64)
        except KeyError as error:
            raise UnknownIdError(self._explain(error.args[0])) from None

    def decode(self, internal: Sequence[int] | np.ndarray) -> list[Hashable]:
        """External ids of internal ids; raises IndexError for one outside 0..N-1."""
        out = []
        for i in np.asarray(internal, dtype=np.int64).reshape(-1).tolist():
            if not 0 <= i < len(self._ids):
                raise IndexError(f"internal: expected 0..{len(self._ids) - 1}, got {i}")
            out.append(self._ids[i])
        return out

    def _known(self, external: Hashable) -> Hashable:
        """The id that `external` means: itself, or the integer that its text spells."""
        if external in self._index or not isinstance(external, str):
            return external
        if re.fullmatch(r"0|-?[1-9]\d{0,18}", external) and int(external) in self._index:
            return int(external)
        return external

    def _explain(self, external: Hashable) -> str:
        message = f"unknown id {external!r}: not one of the {len(self._ids)} known ids"
        other = str(external) if not isinstance(external, str) else None
        if other is not None and other in self._index:
            message += f"; ids are text here, did you mean {other!r}?"
        return message

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, external: object) -> bool:
        return isinstance(external, Hashable) and self._known(external) in self._index

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdMap) and self._ids == other._ids

    def __hash__(self) -> int:
        return hash(self._ids)

    def __repr__(self) -> str:
        return f"IdMap({len(self._ids)} ids)"


@dataclass(frozen=True, eq=False)
class Catalog:
    """The items. Row i of `fields` describes internal item i.

    Args:
        ids: external item ids.
        fields: [N] rows; a text column "title" without nulls or blanks, and any further columns
            (description, average_rating, rating_number, genres, brand, ...).
    """

    ids: IdMap
    fields: pl.DataFrame

    def __post_init__(self) -> None:
        if "title" not in self.fields.columns:
            raise ValueError(f"fields: expected a column 'title', got {self.fields.columns}")
        if self.fields.height != len(self.ids):
            raise ValueError(
                f"fields: expected one row per id ({len(self.ids)}), got {self.fields.height}"
            )
        title = self.fields["title"]
        if title.dtype != pl.String:
            raise TypeError(f"fields: column 'title' must be text, got {title.dtype}")
        blank = (title.is_null() | (title.str.strip_chars() == "")).arg_true()
        if len(blank):
            item = self.ids.ids[blank[0]]
            raise ValueError(
                f"fields: every item needs a title, got none for item {item!r} "
                f"({len(blank)} items without title)"
            )

    @property
    def titles(self) -> list[str]:
        """Titles in internal order."""
        return self.fields["title"].to_list()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class History:
    """What is known of one user before a target event.

    Args:
        items: [L] int64 internal ids, oldest first.
        timestamps: [L] int64 unix seconds, or None where the source has no times.
        ratings: [L] float32, NaN where missing, or None where the source has no ratings.
        target_time: unix seconds of the event to predict, or None.
    """

    items: np.ndarray
    timestamps: np.ndarray | None = None
    ratings: np.ndarray | None = None
    target_time: int | None = None

    def __post_init__(self) -> None:
        for name in ("timestamps", "ratings"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.items):
                raise ValueError(
                    f"{name}: expected {len(self.items)} values, one per item, got {len(value)}"
                )

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, eq=False)
class InteractionData:
    """Users' events over a catalog, ragged by user.

    Args:
        users: external user ids.
        catalog: the items.
        offsets: [U+1] int64; user u owns events offsets[u]..offsets[u+1]-1.
        item: [E] int64 internal item ids, a user's events ordered by (time, external item id);
            without times, in the order of the file.
        timestamp: [E] int64 unix seconds, or None.
        rating: [E] float32, NaN where missing, or None.
        report: what was read, dropped and changed on the way.
    """

    users: IdMap
    catalog: Catalog
    offsets: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray | None
    rating: np.ndarray | None
    report: LoadReport

    def __post_init__(self) -> None:
        events = len(self.item)
        if self.offsets.shape != (len(self.users) + 1,):
            raise ValueError(
                f"offsets: expected shape [{len(self.users) + 1}], got {list(self.offsets.shape)}"
            )
        if self.offsets[0] != 0 or self.offsets[-1] != events or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"offsets: expected to rise from 0 to the {events} events")
        for name in ("timestamp", "rating"):
            value = getattr(self, name)
            if value is not None and len(value) != events:
                raise ValueError(f"{name}: expected {events} values, got {len(value)}")
        if events and (self.item.min() < 0 or self.item.max() >= len(self.catalog)):
            raise ValueError(
                f"item: expected internal ids in 0..{len(self.catalog) - 1}, "
                f"got {self.item.min()}..{self.item.max()}"
            )

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        return len(self.catalog)

    @property
    def num_events(self) -> int:
        return len(self.item)


@dataclass(frozen=True, eq=False)
class Examples:
    """Next-item examples: predict event `position` (>= 1) of `user` from the events before it.

    Args:
        user: [X] int64 internal user ids.
        position: [X] int64 index of the target within the user's events.
    """

    user: np.ndarray
    position: np.ndarray

    def __post_init__(self) -> None:
        if self.user.shape != self.position.shape or self.user.ndim != 1:
            raise ValueError(
                "user, position: expected two arrays of one length, "
                f"got shapes {list(self.user.shape)} and {list(self.position.shape)}"
            )

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, index: slice | np.ndarray) -> Examples:
        """A subset, by slice, mask or index array."""
        return Examples(np.atleast_1d(self.user[index]), np.atleast_1d(self.position[index]))

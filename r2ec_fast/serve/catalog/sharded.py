"""A table split by rows over several processes, for catalogs larger than one machine's memory.

Each shard holds a part of the rows and searches it; whoever asks merges what the shards found, with
the result of a search of the whole table (`r2ec_kernels.merge_topk`). A change is a numbered
version: every process that reads the log of changes brings it to the shards, the first one counts,
and a search is answered only by shards that all hold the version it asks for. So an answer never
mixes two versions. A shard that has been started again is brought up to date from the log.

How the shards are called is the business of `Ask`, so that nothing here knows of Ray.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.serve.catalog.table import (
    KEPT_VERSIONS,
    Allowed,
    Exclude,
    Hits,
    TableMoved,
    Version,
    log_prob_of_best,
)
from r2ec_kernels import ItemIndex, LiveIndex, TopK, merge_topk

# An allow-list: ids of the table; or bool by row of the shard's first rows, and of all added rows.
Include = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
# Calls a method of shards, with arguments for each shard by its number; the answers likewise.
Ask = Callable[[str, "dict[int, tuple[Any, ...]]"], "dict[int, Any]"]


class Change(NamedTuple):
    """A version of the table, and what of it concerns a shard or the table.

    Attributes:
        number: of the version that it leads to.
        first: id of its first new row; the other rows follow.
        rows: [n, d], or None.
        remove: ids.
    """

    number: int
    first: int
    rows: torch.Tensor | None
    remove: list[int]


class Part(NamedTuple):
    """What a shard found for B users. ``log_prob`` [B]: of its best row, among its own rows."""

    number: int
    top: TopK | None  # None: the shard holds another version
    log_prob: torch.Tensor | None


def shard_bounds(num_rows: int, shards: int) -> list[int]:
    """Where each of the shards begins, and where the last one ends: [shards + 1]."""
    return [num_rows * shard // shards for shard in range(shards + 1)]


class TableShard:
    """A part of the rows; those that changes add come behind them.

    Args:
        base: the whole table before the first change, of ids 0 .. N-1; not kept.
        shard: number of this part.
        shards: of parts.
        copies: see `LiveIndex`.
    """

    def __init__(self, base: ItemIndex, shard: int, shards: int, *, copies: int = 2) -> None:
        self._num_base = base.num_ids
        self._first, end = shard_bounds(self._num_base, shards)[shard : shard + 2]
        self._count = end - self._first
        index = ItemIndex(
            base.rows(range(self._first, end)),
            similarity=base.similarity,
            temperature=base.temperature,
            scan=base.scan,
        )
        self._added = torch.zeros(0, dtype=torch.int64)  # ids of the rows behind them, ascending
        self._removed: deque[dict[int, torch.Tensor]] = deque(maxlen=KEPT_VERSIONS)
        self._index = LiveIndex(index, copies=copies)
        self._changing = threading.Lock()

    def search(
        self,
        number: int,
        states: torch.Tensor,
        k: int,
        exclude: tuple[torch.Tensor, torch.Tensor],
        include: Include,
    ) -> Part:
        """The k best of this part's rows, where it holds version ``number`` of the table;
        ``exclude``: ids of the whole table, (values, offsets)."""
        with self._index.snapshot() as (table, own):
            if own != number:
                return Part(own, None, None)
            lists = self._own_lists(exclude, table.num_ids)
            given = {} if include is None else {"include": self._own(include, table.num_ids)}
            top = table.search(states, k, exclude=lists, **given)
            log_prob = log_prob_of_best(table, states, top.indices, lists, given)
        return Part(own, TopK(top.scores, self._ids_of(top.indices)), log_prob)

    def change(self, change: Change) -> int:
        """Make a change, unless it has been made, or an earlier one is missing; returns the number
        of the version that this shard holds."""
        with self._changing:
            if self._index.version == change.number - 1:
                places = self._places(torch.tensor(change.remove, dtype=torch.int64))
                own = places >= 0
                gone = [id_ for id_, here in zip(change.remove, own.tolist(), strict=True) if here]
                count = 0 if change.rows is None else len(change.rows)
                before = self._added
                self._removed.append(dict(zip(gone, self.rows(gone), strict=True)))
                self._added = torch.cat([before, torch.arange(change.first, change.first + count)])
                try:
                    self._index.change(change.rows, places[own].tolist() or None)
                except BaseException:
                    self._added = before
                    self._removed.pop()
                    raise
            return self._index.version

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """Rows [n, d] of ids of this part, also of those that were removed by one of the last
        changes: a process that is about to make such a change asks what it undoes."""
        gone = {id_: row for change in list(self._removed) for id_, row in change.items()}
        with self._index.snapshot() as (table, _):
            here = [id_ for id_ in ids if id_ not in gone]
            found = table.rows(self._places(torch.tensor(here, dtype=torch.int64)))
            by_id = gone | dict(zip(here, found, strict=True))
            return torch.stack([by_id[id_] for id_ in ids]) if len(ids) else found

    def _places(self, ids: torch.Tensor) -> torch.Tensor:
        """Place in this part of each id of the table, -1 where it is not here."""
        place = ids - self._first
        place = torch.where((place >= 0) & (place < self._count), place, -1)
        if len(self._added):
            at = torch.searchsorted(self._added, ids).clamp(max=len(self._added) - 1)
            place = torch.where(self._added[at] == ids, self._count + at, place)
        return place

    def _ids_of(self, places: torch.Tensor) -> torch.Tensor:
        """Ids of the table of this part's places; -1 stays."""
        ids = torch.where(places >= 0, places + self._first, -1)
        if not len(self._added):
            return ids
        return torch.where(
            places >= self._count, self._added[(places - self._count).clamp(min=0)], ids
        )

    def _own(self, include: Include, num: int) -> torch.Tensor:
        """An allow-list of the table as one of this part's ``num`` places."""
        if isinstance(include, tuple):
            base, added = include
            mine = self._added[: num - self._count] - self._num_base
            return torch.cat([base, added[mine]])
        assert include is not None
        places = self._places(include)
        return places[(places >= 0) & (places < num)]

    def _own_lists(self, exclude: tuple[torch.Tensor, torch.Tensor], num: int) -> list[list[int]]:
        values, offsets = exclude
        places = self._places(values)
        bounds = offsets.tolist()
        lists = [places[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        return [own[(own >= 0) & (own < num)].tolist() for own in lists]


class ShardedTable:
    """The whole table, as one process sees it (a `LiveTable`). A change that fails may have been
    made by some shards: where it is in the log, making it again completes it.

    Args:
        base: the table that the shards were made of; not kept.
        shards: number of them; shard i holds the rows from ``shard_bounds(len(base), shards)[i]``.
        ask: calls them.
        rows_since: the rows of every change behind a version, from the log.
    """

    def __init__(
        self,
        base: ItemIndex,
        shards: int,
        ask: Ask,
        rows_since: Callable[[int], Iterable[torch.Tensor | None]],
    ) -> None:
        self.dim, self.dtype = base.dim, base.dtype
        self._all, self._ask, self._rows_since = range(shards), ask, rows_since
        self._bounds = shard_bounds(base.num_ids, shards)
        self._ends = torch.tensor(self._bounds[1:])
        self._version = Version(0, base.num_ids, len(base))
        self._changes: list[Change] = []  # without their rows

    @property
    def version(self) -> Version:
        return self._version

    def search(
        self, states: torch.Tensor, k: int, exclude: Exclude, allowed: Allowed
    ) -> tuple[Hits, int]:
        number, num_ids, _ = self._version
        lists = Ragged.of([np.asarray(list(ids), np.int64) for ids in exclude]).tensors()
        states, include = states.cpu(), allowed(num_ids)
        asked = {i: (number, states, k, lists, self._own(include, i)) for i in self._all}
        parts = self._ask("search", asked)
        for shard, part in parts.items():
            if part.number < number:
                self._bring_up(shard, part.number)
        if any(part.number != number for part in parts.values()):
            raise TableMoved(f"shards hold other versions than {number}")
        return merged(list(parts.values()), k), number

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        if not len(ids):
            return torch.zeros(0, self.dim, dtype=self.dtype)
        holders = self._holders(torch.tensor(ids))
        own = {i: [id_ for id_, h in zip(ids, holders, strict=True) if h == i] for i in holders}
        found = self._ask("rows", {i: (part,) for i, part in own.items()})
        by_id = {
            id_: row for i, part in own.items() for id_, row in zip(part, found[i], strict=True)
        }
        return torch.stack([by_id[id_] for id_ in ids])

    def change(self, rows: torch.Tensor | None, remove: Sequence[int]) -> tuple[int, int]:
        count = 0 if rows is None else len(rows)
        number, first, live = self._version
        change = Change(number + 1, first, rows, list(remove))
        self._changes.append(change._replace(rows=None))
        try:
            for shard, own in self._tell(change, self._all).items():
                if own < change.number:
                    self._bring_up(shard, own)
        except BaseException:
            self._changes.pop()
            raise
        self._version = Version(number + 1, first + count, live + count - len(remove))
        return first, number + 1

    def _own(self, include: torch.Tensor | None, shard: int) -> Include:
        """What of an allow-list a shard needs: of a mask not more than its own part."""
        if include is None or include.dtype != torch.bool:
            return include
        begin, end = self._bounds[shard : shard + 2]
        return include[begin:end], include[self._bounds[-1] :]

    def _tell(self, change: Change, shards: Iterable[int]) -> dict[int, int]:
        """Bring a change to shards, to each its part; the versions they hold then."""
        count = 0 if change.rows is None else len(change.rows)
        new = self._holders(torch.arange(change.first, change.first + count))
        return self._ask("change", {shard: (self._part(change, new, shard),) for shard in shards})

    def _part(self, change: Change, holders: list[int], shard: int) -> Change:
        """All new rows of a change go to one shard, so their ids stay one range."""
        mine = bool(holders) and holders[0] == shard
        return change if mine else change._replace(rows=None)

    def _bring_up(self, shard: int, own: int) -> None:
        """Make the changes that a shard has not made: it has been started again."""
        for change, rows in zip(self._changes[own:], self._rows_since(own), strict=False):
            self._tell(change._replace(rows=rows), [shard])

    def _holders(self, ids: torch.Tensor) -> list[int]:
        """Which shard holds each id."""
        base = torch.searchsorted(self._ends, ids, right=True)
        starts = torch.tensor([change.first for change in self._changes] or [0])
        added = (torch.searchsorted(starts, ids, right=True) - 1) % len(self._all)
        return torch.where(base < len(self._all), base, added).tolist()


def merged(parts: Sequence[Part], k: int) -> Hits:
    """What a search of all parts together finds.

    With s_i the best score of part i and p_i its log-probability among the part's own rows, the
    part's log-sum-exp is s_i - p_i.
    """
    tops = [part.top for part in parts if part.top is not None]
    found = merge_topk(tops, k)
    if not k:
        return Hits(found.indices, found.scores, found.scores)
    best = torch.stack([top.scores[:, 0].double() for top in tops])
    own = torch.stack([part.log_prob.double() for part in parts if part.log_prob is not None])
    sums = torch.where(best > -torch.inf, best - own, -torch.inf).logsumexp(0)
    log_probs = (found.scores.double() - sums[:, None]).float()
    return Hits(found.indices, found.scores, log_probs.masked_fill(found.indices < 0, -torch.inf))

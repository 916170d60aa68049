"""The items that are recommended, while they change: texts, item table and log in step.

Every item is a row of the table, and a changed item is a new row: the old one is removed. So what a
row stands for never changes, and an answer's ids, titles and scores belong together whatever is
written meanwhile. A change is

    encoded     by the model                            (the caller)
    logged      with its rows, and synced to the disk   (`write_ahead`)
    applied     to the table (`table`), whose searches see all of it or nothing

and only then acknowledged. At the start the log is read again over the table on disk.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from r2ec_fast.data import Catalog, IdMap
from r2ec_fast.data.filters import matching
from r2ec_fast.serve.catalog.items import Item, Items
from r2ec_fast.serve.catalog.records import Fields, of_record, to_record
from r2ec_fast.serve.catalog.table import KEPT_VERSIONS, LiveTable, TableMoved

if TYPE_CHECKING:
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.serve.catalog.write_ahead import ChangeLog

KEPT_MASKS = 64  # of filters
SEARCHES = 100  # of a table that others change, before one is given up


@dataclass(frozen=True)
class Found:
    """What a search found for one user: items best first, with their scores."""

    ids: list[Hashable]
    titles: list[str]
    scores: list[float]
    log_probs: list[float]

    def first(self, k: int) -> Found:
        """The k best of them."""
        return Found(self.ids[:k], self.titles[:k], self.scores[:k], self.log_probs[:k])


class VersionGone(ValueError):
    """A version that a rollback cannot reach any more."""


class LiveCatalog:
    """A model's items.

    Args:
        model: encodes new items.
        catalog: the items at the beginning, in the order of the table.
        table: their rows.
        log: where changes are kept; its records are applied now. None: changes are lost with the
            process.

    Attributes:
        items: texts, by id and by row.
    """

    def __init__(
        self,
        model: R2ecModel,
        catalog: Catalog,
        table: LiveTable,
        log: ChangeLog | None = None,
    ) -> None:
        self._model, self._log = model, log
        builder = model.prompt_builder(catalog)
        self.items = Items(catalog, builder.titles, builder.clean_title)
        self._history: deque[tuple[int, dict[Hashable, tuple[Fields, torch.Tensor] | None]]]
        self._history = deque(maxlen=KEPT_VERSIONS)
        self._masks: OrderedDict[str, tuple[int, torch.Tensor]] = OrderedDict()
        self._mask_lock = threading.Lock()
        self._writing = threading.Lock()  # a change after the other
        self._table = table
        for record in log or ():
            self._apply(*of_record(record))

    # ---- reading --------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of changes since the table on disk."""
        return self._table.version.number

    @property
    def width(self) -> int:
        """Numbers of a state."""
        return self._table.dim

    def __len__(self) -> int:
        return self._table.version.live

    def search(
        self,
        states: torch.Tensor,
        k: int,
        *,
        exclude: Sequence[Sequence[int]],
        wanted: Mapping[str, Any] | None = None,
        include: Sequence[Hashable] | None = None,
    ) -> tuple[list[Found], int]:
        """The k best items for each of B users, and the version of the table that was searched.

        Args:
            states: [B, d], user states.
            exclude: rows that are not found, B lists.
            wanted: a filter on the items' columns (`filters`).
            include: external ids of the only items that may be found; unknown ones are ignored.
        """
        allowed = partial(self._allowed, wanted, include)
        for _ in range(SEARCHES):
            try:
                hits, version = self._table.search(states, k, exclude, allowed)
                users = zip(*(values.tolist() for values in hits), strict=True)
                return [self._found(*user) for user in users], version
            except TableMoved:
                self.follow()
        raise RuntimeError(f"the item table changed during each of {SEARCHES} searches")

    def _found(self, ids: list[int], scores: list[float], log_probs: list[float]) -> Found:
        kept = [row for row in ids if row >= 0]
        return Found(
            ids=[self.items.ids[row] for row in kept],
            titles=[self.items.titles[row] for row in kept],
            scores=scores[: len(kept)],
            log_probs=log_probs[: len(kept)],
        )

    def check_filter(self, wanted: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the column, where a filter does not fit the items."""
        self._mask(wanted)

    # ---- changes --------------------------------------------------------------------------------

    def encode(
        self, items: Sequence[tuple[Hashable, Fields]], max_tokens: int = 8192
    ) -> torch.Tensor:
        """Rows [n, d] of new or changed items (external id, fields), by the model."""
        columns = list(dict.fromkeys(name for _, fields in items for name in fields))
        table = pl.DataFrame(
            {name: [fields.get(name) for _, fields in items] for name in columns}, strict=False
        )
        catalog = Catalog(IdMap([id_ for id_, _ in items]), table)
        return self._model.encode_items(catalog, max_tokens=max_tokens).to(self._table.dtype)

    def put(self, items: Sequence[tuple[Hashable, Fields]], rows: torch.Tensor) -> int:
        """Add items, or change those whose ids are known; returns the version that holds them."""
        return self._change([(self.items.key(id_), fields) for id_, fields in items], rows, [])

    def delete(self, ids: Sequence[Hashable]) -> int:
        """Remove items; returns the version without them. UnknownIdError names one that is not
        there."""
        with self._writing:
            keys = [self.items.get(id_).id for id_ in dict.fromkeys(ids)]
            return self._change([], None, keys, held=True)

    def rollback(self, version: int) -> int:
        """Make the items again what they were at ``version``, as a new version; returns that.

        Raises VersionGone where it is not one of the last `KEPT_VERSIONS`.
        """
        with self._writing:
            now = self.version
            reachable = self._history[0][0] - 1 if self._history else now
            if not reachable <= version <= now:
                raise VersionGone(
                    f"version: expected one of {reachable}..{now}, which are still known, got "
                    f"{version}"
                )
            before: dict[Hashable, tuple[Fields, torch.Tensor] | None] = {}
            for number, earlier in reversed(self._history):
                if number > version:
                    before |= earlier
            kept = [(key, *state) for key, state in before.items() if state is not None]
            gone = [key for key, state in before.items() if state is None]
            gone = [key for key in gone if self.items.item(key) is not None]
            rows = torch.stack([row for _, _, row in kept]) if kept else None
            return self._change([(key, fields) for key, fields, _ in kept], rows, gone, held=True)

    def follow(self) -> None:
        """Make the changes that others have logged since; no change of ours comes between."""
        with self._writing:
            for record in self._log.news() if self._log is not None else ():
                self._apply(*of_record(record))

    def _change(
        self,
        items: Sequence[tuple[Hashable, Fields]],
        rows: torch.Tensor | None,
        gone: Sequence[Hashable],
        held: bool = False,
    ) -> int:
        if not held:
            with self._writing:
                return self._change(items, rows, gone, held=True)
        if self._log is not None:
            for earlier in self._log.append(to_record(items, rows, gone)):
                self._apply(*of_record(earlier))
        try:
            return self._apply(items, rows, gone)
        except BaseException:
            if self._log is not None:
                self._log.drop_last()
            raise

    def _apply(
        self,
        items: Sequence[tuple[Hashable, Fields]],
        rows: torch.Tensor | None,
        gone: Sequence[Hashable],
    ) -> int:
        """Make a change that is in the log."""
        old = {key: self.items.item(key) for key in (*(key for key, _ in items), *gone)}
        removed = [item.row for item in old.values() if item is not None]
        earlier = self._states(old)
        # before the table has the rows: a search that finds one finds its text too
        first = self.items.add_rows(items)
        try:
            begin, version = self._table.change(rows, removed)
        except BaseException:
            self.items.drop_rows(first)
            raise
        assert begin == first
        self.items.settle(items, first, gone, version)
        self._history.append((version, earlier))
        return version

    def _states(
        self, items: Mapping[Hashable, Item | None]
    ) -> dict[Hashable, tuple[Fields, torch.Tensor] | None]:
        """What a rollback needs of items that are about to change: their fields and rows."""
        present = [item for item in items.values() if item is not None]
        rows = self._table.rows([item.row for item in present]) if present else ()
        states: dict[Hashable, tuple[Fields, torch.Tensor] | None] = dict.fromkeys(items)
        states |= {item.id: (item.fields, row) for item, row in zip(present, rows, strict=True)}
        return states

    # ---- filters --------------------------------------------------------------------------------

    def _allowed(
        self,
        wanted: Mapping[str, Any] | None,
        include: Sequence[Hashable] | None,
        num_ids: int,
    ) -> torch.Tensor | None:
        """The rows that a filter and an allow-list leave, bool by row or int64; None: all."""
        rows = None
        if include is not None:
            found = [self.items.item(self.items.key(given)) for given in include]
            known = [item.row for item in found if item is not None and item.row < num_ids]
            rows = torch.tensor(known, dtype=torch.int64)
        if wanted is None:
            return rows
        mask = self._mask(wanted)[:num_ids]  # rows may have been added since
        return mask if rows is None else rows[mask[rows]]

    def _mask(self, wanted: Mapping[str, Any]) -> torch.Tensor:
        """Which rows pass a filter, bool by row."""
        with self._mask_lock:
            count, key = len(self.items.ids), repr(wanted)
            known = self._masks.get(key)
            if known is not None and known[0] == count:
                self._masks.move_to_end(key)
                return known[1]
            mask = torch.from_numpy(matching(self.items.frame(), wanted).to_numpy().copy())
            self._masks[key] = (len(mask), mask)
            while len(self._masks) > KEPT_MASKS:
                self._masks.popitem(last=False)
            return mask

"""The items that are recommended, while they change: texts, item table and log in step.

Every item is a row of the table, and a changed item is a new row: the old one is removed. So what a
row stands for never changes, and an answer's ids, titles and scores belong together whatever is
written meanwhile. A change is

    encoded     by the model                            (the caller)
    logged      with its rows, and synced to the disk   (`write_ahead`)
    applied     to the copy of the table that nobody searches, which then takes over (`LiveIndex`)

and only then acknowledged. At the start the log is read again over the table on disk.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from r2ec_fast.data import Catalog, IdMap
from r2ec_fast.serve.filters import matching
from r2ec_fast.serve.item_records import Fields, of_record, to_record
from r2ec_fast.serve.items import Item, Items
from r2ec_kernels import ItemIndex, LiveIndex, TopK

if TYPE_CHECKING:
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.serve.write_ahead import ChangeLog, Record

KEPT_VERSIONS = 64  # that a rollback can reach
KEPT_MASKS = 64  # of filters


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
        model: with its item table, which this object owns from now on.
        catalog: the items, in the order of the table.
        log: where changes are kept; its records are applied now. None: changes are lost with the
            process.
        copies: of the table, see `LiveIndex`.

    Attributes:
        items: texts, by id and by row.
    """

    def __init__(
        self,
        model: R2ecModel,
        catalog: Catalog,
        *,
        log: ChangeLog | None = None,
        copies: int = 2,
    ) -> None:
        assert model.index is not None  # the caller has encoded the catalog
        self._model, self._log = model, log
        builder = model.prompt_builder(catalog)
        self.items = Items(catalog, builder.titles, builder.clean_title)
        self._history: deque[tuple[int, dict[Hashable, tuple[Fields, torch.Tensor] | None]]]
        self._history = deque(maxlen=KEPT_VERSIONS)
        self._masks: OrderedDict[str, tuple[int, torch.Tensor]] = OrderedDict()
        self._mask_lock = threading.Lock()
        self._writing = threading.Lock()  # a change after the other
        self._index = LiveIndex(model.index, copies=copies)
        for record in log or ():
            self._apply(*of_record(record))

    # ---- reading --------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of changes since the table on disk."""
        return self._index.version

    @property
    def width(self) -> int:
        """Numbers of a state."""
        with self._index.snapshot() as (table, _):
            return table.dim

    def __len__(self) -> int:
        return len(self._index)

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
        with self._index.snapshot() as (table, version):
            allowed = self._allowed(table, wanted, include)
            settings: dict[str, Any] = {"exclude": [list(rows) for rows in exclude]}
            if allowed is not None:
                settings["include"] = allowed
            best = table.search(states, k, **settings)
            log_probs = _log_probs(table, states, best, settings)
        rows = best.indices.tolist()
        found = []
        for place, scores in enumerate(best.scores.tolist()):
            kept = [row for row in rows[place] if row >= 0]
            found.append(
                Found(
                    ids=[self.items.ids[row] for row in kept],
                    titles=[self.items.titles[row] for row in kept],
                    scores=scores[: len(kept)],
                    log_probs=log_probs[place][: len(kept)],
                )
            )
        return found, version

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
        rows = self._model.encode_items(catalog, max_tokens=max_tokens)
        with self._index.snapshot() as (index, _):
            return rows.to(index.dtype)

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

    def follow(self, news: Callable[[], Iterable[Record]]) -> None:
        """Make the changes that others have logged since; no change of ours comes between."""
        with self._writing:
            for record in news():
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
            ids, version = self._index.change(rows, removed or None)
        except BaseException:
            self.items.drop_rows(first)
            raise
        assert ids.tolist() == list(range(first, first + len(items)))
        self.items.settle(items, first, gone, version)
        self._history.append((version, earlier))
        return version

    def _states(
        self, items: Mapping[Hashable, Item | None]
    ) -> dict[Hashable, tuple[Fields, torch.Tensor] | None]:
        """What a rollback needs of items that are about to change: their fields and rows."""
        present = [item for item in items.values() if item is not None]
        with self._index.snapshot() as (table, _):
            rows = table.rows([item.row for item in present]) if present else ()
        states: dict[Hashable, tuple[Fields, torch.Tensor] | None] = dict.fromkeys(items)
        states |= {item.id: (item.fields, row) for item, row in zip(present, rows, strict=True)}
        return states

    # ---- filters --------------------------------------------------------------------------------

    def _allowed(
        self,
        table: ItemIndex,
        wanted: Mapping[str, Any] | None,
        include: Sequence[Hashable] | None,
    ) -> torch.Tensor | None:
        """The rows that a filter and an allow-list leave, bool by row or int64; None: all."""
        rows = None
        if include is not None:
            found = [self.items.item(self.items.key(given)) for given in include]
            known = [item.row for item in found if item is not None and item.row < table.num_ids]
            rows = torch.tensor(known, dtype=torch.int64)
        if wanted is None:
            return rows
        mask = self._mask(wanted)[: table.num_ids]  # rows may have been added since
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


def _log_probs(
    table: ItemIndex, states: torch.Tensor, best: TopK, settings: dict[str, Any]
) -> list[list[float]]:
    """Log-probability of each item found, among all items that may be found."""
    first = best.indices[:, :1].clamp(min=0)
    if not best.indices.shape[1] or not len(table):
        return best.scores.tolist()
    some = best.indices[:, 0] >= 0
    log_probs = best.scores.new_full(best.scores.shape, -torch.inf)
    if bool(some.any()):
        own = dict(settings)
        own["exclude"] = [
            e for e, kept in zip(settings["exclude"], some.tolist(), strict=True) if kept
        ]
        top = table.target_stats(states[some], first[some, 0], **own).log_prob
        log_probs[some] = top[:, None] + (best.scores[some] - best.scores[some, :1])
    return log_probs.tolist()

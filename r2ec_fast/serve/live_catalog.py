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

from r2ec_fast.data import Catalog, IdMap, UnknownIdError
from r2ec_fast.serve.filters import matching
from r2ec_fast.serve.item_records import Fields, of_record, to_record
from r2ec_kernels import ItemIndex, LiveIndex, TopK

if TYPE_CHECKING:
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.serve.write_ahead import ChangeLog, Record

KEPT_VERSIONS = 64  # that a rollback can reach
KEPT_MASKS = 64  # of filters


@dataclass(frozen=True)
class Item:
    """An item as it is now.

    Attributes:
        id: external id.
        fields: title, and what else the catalog has of it.
        row: of the table.
        version: of the table, since which it is so; 0: from the beginning.
    """

    id: Hashable
    fields: Fields
    row: int
    version: int


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
        titles: text of each row in a prompt; grows with the table.
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
        self._builder = model.prompt_builder(catalog)
        self.titles: list[str] = self._builder.titles
        self._base = catalog
        self._shown = catalog.titles
        self._ids: list[Hashable] = list(catalog.ids.ids)
        self._added: list[Fields] = []  # fields of the rows behind the base's
        self._changed: dict[Hashable, Item | None] = {}  # None: removed
        self._gone: dict[Hashable, Item] = {}  # removed items as they last were
        self._rows: dict[Hashable, list[int]] = {}  # all rows an item ever had, if more than one
        self._by_title: dict[str, set[Hashable]] | None = None
        self._history: deque[tuple[int, dict[Hashable, tuple[Fields, torch.Tensor] | None]]]
        self._history = deque(maxlen=KEPT_VERSIONS)
        self._masks: OrderedDict[str, tuple[int, torch.Tensor]] = OrderedDict()
        self._lock = threading.RLock()  # of the texts
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

    def get(self, given: Hashable) -> Item:
        """The item with this external id; UnknownIdError where there is none (now)."""
        with self._lock:
            key = self._known(given)
            item = None if key is None else self._item(key)
        if item is None:
            raise UnknownIdError(f"unknown item {given!r}")
        return item

    def find(self, given: Hashable) -> Item:
        """The item with this external id, or else with this title (case is ignored). An item that
        has been removed is found by its id as it last was: people bought it.

        Raises UnknownIdError, and ValueError for a title of several items.
        """
        with self._lock:
            key = self._known(given)
            if key is not None:
                return self.get(key)
            for key in (given, _as_int(given)):
                if key is not None and key in self._gone:
                    return self._gone[key]
            found = sorted(self._titled(str(given).casefold()), key=str)
            if not found:
                raise UnknownIdError(f"unknown item {given!r}: neither an item id nor a title")
            if len(found) > 1:
                raise ValueError(f"the title {given!r} belongs to several items: {found[:5]}")
            return self.get(found[0])

    def rows_of(self, item: Hashable) -> list[int]:
        """All rows that the item of this external id has had: none of them may be recommended to
        somebody who knows it."""
        with self._lock:
            if item in self._rows:
                return list(self._rows[item])
            return [int(self._base.ids.encode([item])[0])] if item in self._base.ids else []

    def search_titles(self, text: str, limit: int) -> list[Item]:
        """Items whose title holds ``text`` (case is ignored), in the order of the table."""
        wanted, found = text.casefold(), []
        with self._lock:
            for row, title in enumerate(self._shown):
                if wanted in title.casefold():
                    item = self._item(self._ids[row])
                    if item is not None and item.row == row:
                        found.append(item)
                        if len(found) == limit:
                            break
        return found

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
            allowed = self._allowed(wanted, include)
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
                    ids=[self._ids[row] for row in kept],
                    titles=[self._shown[row] for row in kept],
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
        return self._change([(self._key(id_), fields) for id_, fields in items], rows, [])

    def delete(self, ids: Sequence[Hashable]) -> int:
        """Remove items; returns the version without them. UnknownIdError names one that is not
        there."""
        with self._writing:
            keys = [self.get(id_).id for id_ in dict.fromkeys(ids)]
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
            gone = [key for key in gone if self._item(key) is not None]
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
        keys = [key for key, _ in items]
        with self._lock:
            old = {key: self._item(key) for key in (*keys, *gone)}
            removed = [item.row for item in old.values() if item is not None]
            earlier = self._states(old)
            first = len(self._ids)
            # before the table has the rows: a search that finds one finds its text too
            for key, fields in items:
                self._ids.append(key)
                self._shown.append(fields["title"])
                self.titles.append(self._builder._clean(fields["title"]))
                self._added.append(dict(fields))
        try:
            ids, version = self._index.change(rows, removed or None)
        except BaseException:
            with self._lock:
                for texts in (self._ids, self._shown, self.titles):
                    del texts[first:]
                del self._added[first - len(self._base) :]
            raise
        assert ids.tolist() == list(range(first, first + len(items)))
        with self._lock:
            for place, (key, fields) in enumerate(items):
                row = first + place
                self._rows.setdefault(key, self.rows_of(key)).append(row)
                self._retitle(key, old[key], fields["title"])
                self._changed[key] = Item(key, dict(fields), row, version)
                self._gone.pop(key, None)
            for key in gone:
                last = old[key]
                if last is None:  # another replica has removed it too
                    continue
                self._retitle(key, last, None)
                self._changed[key], self._gone[key] = None, last
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

    # ---- texts ----------------------------------------------------------------------------------

    def _key(self, given: Hashable) -> Hashable:
        """The id under which an item is kept: a known one that ``given`` means, or itself."""
        with self._lock:
            known = self._known(given)
        return given if known is None else known

    def _known(self, given: Hashable) -> Hashable | None:
        """The id of an item that is there now, as the catalog writes it."""
        for key in (given, _as_int(given)):
            if key is None:
                continue
            if self._changed.get(key) is not None:
                return key
            if key not in self._changed and key in self._base.ids:
                return self._base.ids.ids[int(self._base.ids.encode([key])[0])]
        return None

    def _item(self, key: Hashable) -> Item | None:
        if key in self._changed:
            return self._changed[key]
        if key not in self._base.ids:
            return None
        row = int(self._base.ids.encode([key])[0])
        return Item(key, self._base.fields.row(row, named=True), row, 0)

    def _titled(self, title: str) -> set[Hashable]:
        if self._by_title is None:
            self._by_title = {}
            for row, text in enumerate(self._shown):
                item = self._item(self._ids[row])
                if item is not None and item.row == row:
                    self._by_title.setdefault(text.casefold(), set()).add(item.id)
        return self._by_title.get(title, set())

    def _retitle(self, key: Hashable, old: Item | None, title: str | None) -> None:
        if self._by_title is None:
            return
        if old is not None:
            self._by_title[old.fields["title"].casefold()].discard(key)
        if title is not None:
            self._by_title.setdefault(title.casefold(), set()).add(key)

    def _allowed(
        self, wanted: Mapping[str, Any] | None, include: Sequence[Hashable] | None
    ) -> torch.Tensor | None:
        """The rows that a filter and an allow-list leave, bool by row or int64; None: all."""
        if wanted is None and include is None:
            return None
        rows: list[int] = []
        for given in include or ():
            with self._lock:
                key = self._known(given)
                item = None if key is None else self._item(key)
            if item is not None:
                rows.append(item.row)
        if wanted is None:
            return torch.tensor(rows, dtype=torch.int64)
        mask = self._mask(wanted)
        if include is None:
            return mask
        found = torch.tensor([row for row in rows if row < len(mask)], dtype=torch.int64)
        return found[mask[found]]

    def _mask(self, wanted: Mapping[str, Any]) -> torch.Tensor:
        with self._lock:
            count, key = len(self._ids), repr(wanted)
            known = self._masks.get(key)
            if known is not None and known[0] == count:
                self._masks.move_to_end(key)
                return known[1]
            added = list(self._added)
        frame = self._base.fields
        if added:
            columns = {name: [fields.get(name) for fields in added] for name in frame.columns}
            frame = pl.concat([frame, pl.DataFrame(columns, strict=False)], how="vertical_relaxed")
        mask = torch.from_numpy(matching(frame, wanted).to_numpy().copy())
        with self._lock:
            self._masks[key] = (count, mask)
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


def _as_int(given: Hashable) -> int | None:
    text = given if isinstance(given, str) else ""
    return int(text) if text.isascii() and text.isdigit() and str(int(text)) == text else None

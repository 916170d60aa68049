"""The texts of the items, by row of the table and by id, while items come and go.

A row's text never changes: a changed item has a new row. So what a search finds can be read without
a lock, whatever is written meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import polars as pl

from r2ec_fast.data import Catalog, UnknownIdError
from r2ec_fast.serve.catalog.records import Fields


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


class Items:
    """What is known of each item and each row.

    Args:
        catalog: the items at the beginning, in the order of the table.
        prompt_titles: their titles as prompts show them; this list grows with the table.
        clean: what makes a title of the text that a prompt shows.

    Attributes:
        ids: external id of each row.
        titles: title of each row.
        lock: of all of it; held by the methods.
    """

    def __init__(
        self, catalog: Catalog, prompt_titles: list[str], clean: Callable[[str], str]
    ) -> None:
        self._base, self._clean = catalog, clean
        self.prompt_titles = prompt_titles
        self.titles: list[str] = catalog.titles
        self.ids: list[Hashable] = list(catalog.ids.ids)
        self._added: list[Fields] = []  # fields of the rows behind the base's
        self._changed: dict[Hashable, Item | None] = {}  # None: removed
        self._gone: dict[Hashable, Item] = {}  # removed items as they last were
        self._rows: dict[Hashable, list[int]] = {}  # all rows of an item that was ever changed
        self._by_title: dict[str, set[Hashable]] | None = None  # made when it is first asked for
        self.lock = threading.RLock()

    # ---- looking up -----------------------------------------------------------------------------

    def get(self, given: Hashable) -> Item:
        """The item with this external id; UnknownIdError where there is none (now)."""
        with self.lock:
            key = self._known(given)
            item = None if key is None else self.item(key)
        if item is None:
            raise UnknownIdError(f"unknown item {given!r}")
        return item

    def find(self, given: Hashable) -> Item:
        """The item with this external id, or else with this title (case is ignored). An item that
        has been removed is found by its id as it last was: people bought it.

        Raises UnknownIdError, and ValueError for a title of several items.
        """
        with self.lock:
            if self._known(given) is not None:
                return self.get(given)
            for key in _meant(given):
                if key in self._gone:
                    return self._gone[key]
            found = sorted(self._titled(str(given).casefold()), key=str)
            if not found:
                raise UnknownIdError(f"unknown item {given!r}: neither an item id nor a title")
            if len(found) > 1:
                raise ValueError(f"the title {given!r} belongs to several items: {found[:5]}")
            return self.get(found[0])

    def rows_of(self, key: Hashable) -> list[int]:
        """All rows that the item of this id has had: none of them may be recommended to somebody
        who knows it."""
        with self.lock:
            if key in self._rows:
                return list(self._rows[key])
            return [self._base_row(key)] if key in self._base.ids else []

    def search(self, text: str, limit: int) -> list[Item]:
        """Items whose title holds ``text`` (case is ignored), in the order of the table."""
        wanted, found = text.casefold(), []
        for row in range(len(self.titles)):  # no lock: texts of rows stay as they are
            if wanted in self.titles[row].casefold():
                with self.lock:
                    there = row < len(self.ids) and self._is_now(row)
                    item = self.item(self.ids[row]) if there else None
                if item is not None:
                    found.append(item)
                    if len(found) == limit:
                        break
        return found

    def key(self, given: Hashable) -> Hashable:
        """The id under which an item is kept: a known one that ``given`` means, or itself."""
        with self.lock:
            known = self._known(given)
        return given if known is None else known

    def item(self, key: Hashable) -> Item | None:
        """The item of an id as it is kept; None where there is none (now)."""
        with self.lock:
            if key in self._changed:
                return self._changed[key]
            if key not in self._base.ids:
                return None
            row = self._base_row(key)
            return Item(key, self._base.fields.row(row, named=True), row, 0)

    def frame(self) -> pl.DataFrame:
        """The columns that the catalog began with, a row a row of the table."""
        with self.lock:
            added = list(self._added)
        frame = self._base.fields
        if not added:
            return frame
        columns = {name: [fields.get(name) for fields in added] for name in frame.columns}
        return pl.concat([frame, pl.DataFrame(columns, strict=False)], how="vertical_relaxed")

    # ---- changing -------------------------------------------------------------------------------

    def add_rows(self, items: Sequence[tuple[Hashable, Fields]]) -> int:
        """Texts of rows that the table is about to have; returns the number of the first."""
        with self.lock:
            first = len(self.ids)
            for key, fields in items:
                self.ids.append(key)
                self.titles.append(fields["title"])
                self.prompt_titles.append(self._clean(fields["title"]))
                self._added.append(dict(fields))
            return first

    def drop_rows(self, first: int) -> None:
        """Take back the rows from ``first`` on: the table did not come to have them."""
        with self.lock:
            for texts in (self.ids, self.titles, self.prompt_titles):
                del texts[first:]
            del self._added[first - len(self._base) :]

    def settle(
        self,
        items: Sequence[tuple[Hashable, Fields]],
        first: int,
        gone: Sequence[Hashable],
        version: int,
    ) -> None:
        """Items are now what their rows from ``first`` on say, and ``gone`` are not any more."""
        with self.lock:
            for row, (key, fields) in enumerate(items, first):
                old = self.item(key)
                self._rows.setdefault(key, self.rows_of(key)).append(row)
                self._changed[key] = Item(key, dict(fields), row, version)
                self._gone.pop(key, None)
                self._retitle(key, old, fields["title"])
            for key in gone:
                old = self.item(key)
                if old is not None:  # else another replica has removed it too
                    self._rows.setdefault(key, self.rows_of(key))
                    self._changed[key], self._gone[key] = None, old
                    self._retitle(key, old, None)

    # ---- inside ---------------------------------------------------------------------------------

    def _known(self, given: Hashable) -> Hashable | None:
        """The id of an item that is there now, as the catalog writes it."""
        for key in _meant(given):
            if self._changed.get(key) is not None:
                return key
            if key not in self._changed and key in self._base.ids:
                own = self._base.ids.ids[self._base_row(key)]
                if self._changed.get(own, own) is not None:
                    return own
        return None

    def _is_now(self, row: int) -> bool:
        """Whether an item has this row now."""
        key = self.ids[row]
        if key not in self._changed:
            return row < len(self._base)
        item = self._changed[key]
        return item is not None and item.row == row

    def _base_row(self, key: Hashable) -> int:
        return int(self._base.ids.encode([key])[0])

    def _titled(self, title: str) -> set[Hashable]:
        if self._by_title is None:
            self._by_title = {}
            for row, text in enumerate(self.titles):
                if self._is_now(row):
                    self._by_title.setdefault(text.casefold(), set()).add(self.ids[row])
        return self._by_title.get(title, set())

    def _retitle(self, key: Hashable, old: Item | None, title: str | None) -> None:
        if self._by_title is None:
            return
        if old is not None:
            self._by_title.get(old.fields["title"].casefold(), set()).discard(key)
        if title is not None:
            self._by_title.setdefault(title.casefold(), set()).add(key)


def _meant(given: Hashable) -> list[Hashable]:
    """The ids that ``given`` may mean: itself, and the integer that a text spells."""
    text = given if isinstance(given, str) else ""
    whole = text.isascii() and text.isdigit() and str(int(text)) == text
    return [given, int(text)] if whole else [given]

"""An index that is searched while it changes."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .._checks import Ids, as_ids
from .index import ItemIndex


class Snapshot(NamedTuple):
    """A table that does not change while it is held, and the number of its state."""

    table: ItemIndex
    version: int


@dataclass(frozen=True)
class Change:
    """Rows [n, d] to add, and ids to remove; either may be None."""

    rows: torch.Tensor | None = None
    remove: Ids | None = None

    def apply(self, index: ItemIndex) -> torch.Tensor:
        """The ids int64 [n] of the new rows. Where it raises, the index is as it was."""
        gone = None if self.remove is None else as_ids("remove", self.remove)
        if gone is not None:
            index.check_ids("remove", gone)
        ids = torch.zeros(0, dtype=torch.int64)
        if self.rows is not None and len(self.rows):
            ids = index.append(self.rows)
        if gone is not None and len(gone):
            index.remove(gone)
        return ids


@dataclass
class _Side:
    index: ItemIndex
    version: int
    readers: int = 0
    behind: list[Change] = field(default_factory=list)  # what the other side has had already


class LiveIndex:
    """Two copies of an :class:`ItemIndex`, so that a search never waits for a change.

    Searches hold one copy; a change is made in the other, which then takes its place. The first
    follows when nobody holds it any more, at the latest before the next change. So a change is seen
    whole or not at all, and costs O(its rows), twice.

    Args:
        index: the table; this object owns it from now on.
        version: number of its state.
        copies: 2, or 1 for half of the memory: searches then wait while a change is made.
    """

    def __init__(self, index: ItemIndex, *, version: int = 0, copies: int = 2) -> None:
        if copies not in (1, 2):
            raise ValueError(f"copies: expected 1 or 2, got {copies}")
        indexes = [index] if copies == 1 else [index, copy.deepcopy(index)]
        self._sides = [_Side(one, version) for one in indexes]
        self._active = 0
        self._writing = threading.Lock()  # one change at a time
        self._guard = threading.Condition()  # of the numbers of readers, and of what is active

    @property
    def version(self) -> int:
        """Number of the newest state."""
        return self._sides[self._active].version

    def __len__(self) -> int:
        """Live rows of the newest state."""
        return len(self._sides[self._active].index)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """The newest state, which stays as it is until it is given back. Search it, do not write
        it; and give it back soon, because the change after the next waits for it."""
        with self._guard:
            side = self._sides[self._active]
            side.readers += 1
        try:
            yield Snapshot(side.index, side.version)
        finally:
            with self._guard:
                side.readers -= 1
                self._guard.notify_all()

    def change(
        self, rows: torch.Tensor | None = None, remove: Ids | None = None
    ) -> tuple[torch.Tensor, int]:
        """Add rows [n, d] and remove ids, in one step.

        Returns the new rows' ids int64 [n], never used before, and the number of the new state.

        Raises TypeError, ValueError (see ``ItemIndex.append``, ``remove``) and MemoryError; the
        table is then as it was.
        """
        change = Change(rows, remove)
        with self._writing:
            side, other = self._sides[-1 - self._active], self._sides[self._active]
            with self._guard:
                self._guard.wait_for(lambda: side.readers == 0)
                if side is other:  # the only copy: new readers wait until it is done
                    ids = change.apply(side.index)
                    side.version += 1
                    return ids, side.version
            while side.behind:
                side.behind[0].apply(side.index)
                side.behind.pop(0)
            ids = change.apply(side.index)
            other.behind.append(change)
            with self._guard:
                side.version = other.version + 1
                self._active = 1 - self._active
            return ids, side.version

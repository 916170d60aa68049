"""The rows of the items, where they are searched: in this process, or in others (`sharded`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from r2ec_kernels import ItemIndex, LiveIndex

KEPT_VERSIONS = 64  # that a rollback can reach


class Hits(NamedTuple):
    """What a search of B users finds: rows best first.

    Attributes:
        ids: int64 [B, k], -1 where there are no more.
        scores: float32 [B, k].
        log_probs: [B, k], log-probability of each row among all that may be found.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    log_probs: torch.Tensor


class Version(NamedTuple):
    """A state of a table: the number of changes made, of the ids given so far, and of the rows that
    are there."""

    number: int
    num_ids: int
    live: int


Exclude = Sequence[Sequence[int]]
Allowed = Callable[[int], torch.Tensor | None]


class TableMoved(RuntimeError):
    """The rows have changes that this process has not made yet; it has to make them first."""


class LiveTable(Protocol):
    """Rows that are searched while they change.

    Attributes:
        dim, dtype: of a row.
    """

    dim: int
    dtype: torch.dtype

    @property
    def version(self) -> Version: ...

    def search(
        self, states: torch.Tensor, k: int, exclude: Exclude, allowed: Allowed
    ) -> tuple[Hits, int]:
        """The k best rows for states [B, d], and the number of the version that was searched.

        Args:
            exclude: ids that are not found, B lists.
            allowed: called with the number of ids of that version; says which may be found: bool
                [num_ids], int64 ids, or None for all.

        Raises TableMoved.
        """

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """Rows [n, d] of ids that are there, or were there in one of the last `KEPT_VERSIONS`."""

    def change(self, rows: torch.Tensor | None, remove: Sequence[int]) -> tuple[int, int]:
        """Add rows [n, d] and remove ids in one step; returns the first new id (the others follow
        it), and the number of the new version. Where it raises, nothing has changed."""


class LocalTable:
    """A table in this process; a search never waits for a change (`LiveIndex`).

    Args:
        index: this object owns it from now on.
        copies: see `LiveIndex`.
    """

    def __init__(self, index: ItemIndex, *, copies: int = 2) -> None:
        self.dim, self.dtype = index.dim, index.dtype
        self._index = LiveIndex(index, copies=copies)

    @property
    def version(self) -> Version:
        with self._index.snapshot() as (table, number):
            return Version(number, table.num_ids, len(table))

    def search(
        self, states: torch.Tensor, k: int, exclude: Exclude, allowed: Allowed
    ) -> tuple[Hits, int]:
        with self._index.snapshot() as (table, number):
            include = allowed(table.num_ids)
            given = {} if include is None else {"include": include}
            own = [list(ids) for ids in exclude]
            best = table.search(states, k, exclude=own, **given)
            first = log_prob_of_best(table, states, best.indices, own, given)
        log_probs = first[:, None] + (best.scores - best.scores[:, :1])
        return Hits(best.indices, best.scores, _known(best.indices, log_probs)), number

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        with self._index.snapshot() as (table, _):
            return table.rows(list(ids))

    def change(self, rows: torch.Tensor | None, remove: Sequence[int]) -> tuple[int, int]:
        first = self.version.num_ids  # the caller makes a change after the other
        ids, number = self._index.change(rows, list(remove) or None)
        assert not len(ids) or int(ids[0]) == first
        return first, number


def log_prob_of_best(
    table: ItemIndex,
    states: torch.Tensor,
    found: torch.Tensor,
    exclude: list[list[int]],
    given: dict[str, Any],
) -> torch.Tensor:
    """Log-probability [B] of the first of the ids found [B, k] among all that may be found; -inf
    where there is none. ``given``: the ``include`` of the search, if there was one."""
    log_prob = torch.full((len(found),), -torch.inf)
    if not found.shape[1]:
        return log_prob
    some = found[:, 0] >= 0
    if bool(some.any()):
        own = [ids for ids, kept in zip(exclude, some.tolist(), strict=True) if kept]
        stats = table.target_stats(states[some], found[some, 0], exclude=own, **given)
        log_prob[some] = stats.log_prob.cpu()
    return log_prob


def _known(ids: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """-inf where no row was found (there -inf minus -inf is not a number)."""
    return log_probs.masked_fill(ids < 0, -torch.inf)

"""Items that must not be returned, or do not compete: as callers give them, and as ops use them.

Callers give padded ids [B, L], values [E] with offsets [B+1], or a list of each query's ids. Ops
use ``ExcludedPairs``: the (query, row) pairs, ordered by row, so that a block of rows finds its own
by two binary searches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._checks import Ids, as_ids, is_array
from .._dispatch import checks_enabled

TensorExclude = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
Exclude = Ids | tuple[Ids, Ids] | Sequence[Ids] | None

_FORMS = "None, padded ids [B, L], a pair (values [E], offsets [B+1]) or a list of each query's ids"


def as_exclude(exclude: Exclude, batch: int) -> TensorExclude:
    """``exclude`` as tensors: padded ids [B, L], or the pair (values [E], offsets [B+1]).

    A tuple of two is that pair. A list has one entry for each query, the ids of that query; two
    tensors or arrays in a list are read as the pair unless the batch has two queries, where they
    might be either.
    """
    if exclude is None:
        return None
    if is_array(exclude):
        return as_ids("exclude", exclude, dims=2)
    if not isinstance(exclude, (tuple, list)):
        raise TypeError(f"exclude: expected {_FORMS}, got {type(exclude).__name__}")
    pair = isinstance(exclude, tuple)
    if not pair and len(exclude) == 2 and all(is_array(part) for part in exclude):
        if batch == 2:
            raise ValueError(
                "exclude: expected a tuple (values, offsets) or lists of ids for the 2 queries, "
                "got a list of two arrays, which might be either"
            )
        pair = True
    if pair:
        if len(exclude) != 2:
            raise ValueError(
                f"exclude: expected (values [E], offsets [{batch + 1}]), got {len(exclude)} parts"
            )
        return as_ids("exclude", exclude[0]), as_ids("exclude offsets", exclude[1])
    if len(exclude) != batch:
        raise ValueError(
            f"exclude: expected a list of ids for each of {batch} queries, got {len(exclude)} lists"
        )
    rows = [
        as_ids(f"exclude[{number}]", list(row) if isinstance(row, (set, frozenset)) else row)
        for number, row in enumerate(exclude)
    ]
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    values = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    return values, lengths.cumsum(0)


def split_exclude(exclude: TensorExclude) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``exclude`` as two optional tensors (values, offsets): the form an op takes."""
    if exclude is None:
        return None, None
    if isinstance(exclude, torch.Tensor):
        return exclude, None
    return exclude


def check_exclude(exclude: TensorExclude, batch: int) -> None:
    """Check the shapes (not values) of ``exclude`` for a batch of ``batch`` rows."""
    values, offsets = split_exclude(exclude)
    if values is None:
        return
    if offsets is None:
        if values.dim() != 2 or values.shape[0] != batch:
            raise ValueError(f"exclude: expected shape [{batch}, L], got {list(values.shape)}")
    elif values.dim() != 1 or offsets.dim() != 1 or offsets.shape[0] != batch + 1:
        raise ValueError(
            f"exclude: expected (values [E], offsets [{batch + 1}]), got shapes "
            f"{list(values.shape)} and {list(offsets.shape)}"
        )


def exclude_part(exclude: TensorExclude, first: int, count: int) -> TensorExclude:
    """The same of the items ``first`` .. first + count - 1, by their places among these; -1 for
    others."""
    values, offsets = split_exclude(exclude)
    if values is None:
        return None
    local = values - first
    local = local.masked_fill((local < 0) | (local >= count), -1)
    return local if offsets is None else (local, offsets)


def normalize_exclude(
    exclude: TensorExclude, batch: int, num_items: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Excluded ids of each row as (values int64 [E], offsets int64 [B+1]) on ``device``.

    Args:
        exclude: None; padded ids [B, L] with -1 for "none" anywhere in a row, repeats allowed; or
            the pair (values, offsets), where row b owns ``values[offsets[b]:offsets[b+1]]``.
        batch: B.
        num_items: ids must lie in -1..num_items-1. Ids that live on a GPU are checked only under
            ``R2EC_CHECK=1``, because the check waits for the device.

    Raises:
        TypeError, ValueError: wrong type, shape or range.
    """
    check_exclude(exclude, batch)
    values, offsets = split_exclude(exclude)
    if values is None:
        zero = torch.zeros(batch + 1, dtype=torch.int64, device=device)
        return torch.empty(0, dtype=torch.int64, device=device), zero
    check = values.device.type == "cpu" or checks_enabled()
    if check:
        check_ids(values, num_items)
    values = values.to(device=device, dtype=torch.int64)
    if offsets is None:
        kept = values >= 0
        counts = kept.sum(1)
        values = values[kept]
    else:
        offsets = offsets.to(device=device, dtype=torch.int64)
        if check:
            check_offsets(offsets, values.numel())
        kept = values >= 0
        running = torch.zeros(values.numel() + 1, dtype=torch.int64, device=device)
        torch.cumsum(kept, 0, out=running[1:])
        counts = running[offsets].diff()
        values = values[kept]
    start = torch.zeros(batch + 1, dtype=torch.int64, device=device)
    torch.cumsum(counts, 0, out=start[1:])
    return values, start


def check_ids(values: torch.Tensor, num_items: int) -> None:
    """Raise ValueError unless all ids lie in -1..num_items-1; waits for the values' device."""
    if values.numel() and (values.min() < -1 or values.max() >= num_items):
        low, high = int(values.min()), int(values.max())
        raise ValueError(
            f"exclude: expected ids in -1..{num_items - 1}, got values in {low}..{high}"
        )


def check_offsets(offsets: torch.Tensor, num_values: int) -> None:
    """Raise ValueError unless ``offsets`` rise from 0 to ``num_values``; waits for their device."""
    bounds = int(offsets[0]), int(offsets[-1])
    if bounds != (0, num_values) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"exclude offsets: expected a non-decreasing sequence from 0 to {num_values}, "
            f"got {bounds[0]} .. {bounds[1]}"
        )


@dataclass(frozen=True)
class ExcludedPairs:
    """(query, row) pairs that must not be returned or do not compete, ordered by row.

    Attributes:
        of: int64 [E], queries in 0..batch-1.
        rows: int64 [E], row positions; -1 for none.
        batch: B.
    """

    of: torch.Tensor
    rows: torch.Tensor
    batch: int

    @classmethod
    def from_offsets(cls, rows: torch.Tensor, offsets: torch.Tensor) -> "ExcludedPairs":
        """Query b's rows are ``rows[offsets[b]:offsets[b+1]]``."""
        batch = offsets.numel() - 1
        queries = torch.arange(batch, device=offsets.device)
        of = torch.repeat_interleave(queries, offsets.diff(), output_size=rows.numel())
        return cls.sort(of, rows, batch)

    @classmethod
    def sort(cls, of: torch.Tensor, rows: torch.Tensor, batch: int) -> "ExcludedPairs":
        """Pairs in any order."""
        if not rows.numel():
            return cls(of, rows, batch)
        order = torch.argsort(rows)
        return cls(of[order], rows[order], batch)

    @classmethod
    def none(cls, batch: int, device: torch.device) -> "ExcludedPairs":
        """No pairs of ``batch`` queries."""
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        return cls(nothing, nothing, batch)

    @property
    def empty(self) -> bool:
        return self.rows.numel() == 0

    @property
    def counts(self) -> torch.Tensor:
        """int64 [B]: pairs of each query."""
        return torch.bincount(self.of, minlength=self.batch)

    @property
    def distinct_counts(self) -> torch.Tensor:
        """int64 [B]: rows of each query's pairs, repeated ones once."""
        own = self.keys()[self.rows >= 0].unique()
        return torch.bincount(own % max(1, self.batch), minlength=self.batch)

    def keys(self) -> torch.Tensor:
        """int64 [E]: row * B + query of each pair."""
        return self.rows * self.batch + self.of

    def holds(self, of: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """bool, the shape of ``of``: whether (of, row) is one of the pairs."""
        return torch.isin(rows * self.batch + of, self.keys())

    def mask(self, start: int, stop: int, scores: torch.Tensor, value: float | int) -> None:
        """Set the pairs' entries in ``scores`` [stop - start, B] of rows start..stop-1."""
        if self.empty:
            return
        edges = torch.tensor([start, stop], device=self.rows.device)
        low, high = torch.searchsorted(self.rows, edges).tolist()
        if high > low:
            scores[self.rows[low:high] - start, self.of[low:high]] = value

    def pick(self, chosen: torch.Tensor) -> "ExcludedPairs":
        """The pairs of the queries in ``chosen`` (bool [B]), renumbered."""
        number = torch.cumsum(chosen, 0) - 1
        kept = chosen[self.of]
        return ExcludedPairs(number[self.of[kept]], self.rows[kept], int(chosen.sum()))

    def pairs_where(self, kept: torch.Tensor) -> "ExcludedPairs":
        """The pairs that ``kept`` (bool [E]) marks."""
        return ExcludedPairs(self.of[kept], self.rows[kept], self.batch)

    def without(self, targets: torch.Tensor) -> "ExcludedPairs":
        """The pairs other than (b, targets[b])."""
        return self.pairs_where(self.rows != targets[self.of])

    def adding(self, targets: torch.Tensor) -> "ExcludedPairs":
        """These pairs and (b, targets[b])."""
        own = torch.arange(self.batch, device=targets.device)
        return self.sort(torch.cat([self.of, own]), torch.cat([self.rows, targets]), self.batch)

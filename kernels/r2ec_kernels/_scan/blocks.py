"""Blocks of coarse scores, and the torch operations that filter them on any device.

A coarse scan multiplies a block of n rows with all B queries: scores [n, B], 2 n B d FLOPs, each
within ``error`` of the raw score g (``_exact.bounds``). Of a row n of query b only one question is
asked, g(n, b) >= cut(b), and for almost all rows the answer is no. So rows are taken in groups of
GROUP, the maximum of a group meets the cut first (``group_best``, one read of the block), and only
groups that reach it are looked into (``entries_from``).

Blocks are visited in an order that spreads over the table (``visiting_order``). Memory: one block,
reused (``Buffer``). Numerics: the products are those of the scan; nothing here rounds.
"""

from typing import NamedTuple, Protocol

import torch

from .._cpu import extension

DENSE_SHARE = 8  # k above (rows - excluded) / 8: every row is scored exactly
CACHED = 1 << 23  # elements of a table that stays in a CPU's cache: its rows may be read twice
GROUP = 32  # rows whose maximum meets the threshold first


class Scores(NamedTuple):
    """Raw scores of a block of rows.

    Attributes:
        values: float32 [n, B], n the rows rounded up to a multiple of GROUP, in any memory order;
            the entries beyond the rows, and those of unbounded rows, are -inf. Valid until the next
            block.
        error: float32 [B], bound of their errors.
        unbounded: int64 [M] rows whose scores it does not bound, or None: rescored in any case.
    """

    values: torch.Tensor
    error: torch.Tensor
    unbounded: torch.Tensor | None


class Buffer:
    """Memory for the scores of one block after another, of any width and type."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def take(self, rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[rows, width], overwritten by the next call for this width and type."""
        key = width, dtype
        if key not in self._memory or rows > self._memory[key].shape[0]:
            self._memory[key] = torch.empty(rows, width, dtype=dtype, device=self._device)
        return self._memory[key][:rows]


class CoarseScan(Protocol):
    """Raw scores of one batch, block by block."""

    name: str  # of its product, for statistics
    height: int  # rows of a block; blocks are multiples of it

    @property
    def offset(self) -> torch.Tensor:
        """float64 [B]: what its raw scores of a query all lack (not for l2)."""
        ...

    def score(self, start: int, stop: int) -> Scores:
        """Raw scores of rows start..stop-1, ``start`` a multiple of ``height``."""
        ...

    def feed(
        self,
        collector: extension.Collector,
        blocks: list[tuple[int, int]],
        allowed: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Offer the scores of all blocks (start, stop), in this order or another, but for rows that
        are not ``allowed`` (bool [N], None: all).

        Returns the unbounded rows int64 [M] of all blocks, or None. On CPUs only.
        """
        ...


def subtracted(
    half: torch.Tensor | None, allowed: torch.Tensor | None, start: int, stop: int
) -> torch.Tensor | None:
    """What is subtracted from the products of the rows start..stop-1, float32: ``half`` [N], and
    infinity of rows that are not ``allowed`` (bool [N]). None for nothing."""
    own = None if half is None else half[start:stop]
    if allowed is None:
        return own
    part = allowed[start:stop]
    own = torch.zeros(stop - start, dtype=torch.float32, device=part.device) if own is None else own
    return own.masked_fill(~part, float("inf"))


def whole_groups(rows: int) -> int:
    """``rows`` rounded up to a multiple of GROUP."""
    return -(-rows // GROUP) * GROUP


def group_best(scores: torch.Tensor) -> torch.Tensor:
    """The largest of each group of a block's scores [n, B], [n / GROUP, B].

    Rows of a group lie n / GROUP apart: in either memory order the maximum is vectorised.
    """
    if scores.is_contiguous():
        return scores.unflatten(0, (GROUP, -1)).amax(0)
    # [B, n] in memory; a reduction is fast only into its input's order
    return scores.T.unflatten(1, (GROUP, -1)).amax(1).T


def entries_from(
    scores: torch.Tensor, of: torch.Tensor, group: torch.Tensor, cut: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scores >= ``cut`` [B] in the groups int64 [M] of the queries ``of`` int64 [M].

    Returns (query, row of the block, score), ordered as ``of`` is.
    """
    grouped = scores.unflatten(0, (GROUP, -1))
    values = grouped[:, group, of].T  # [M, GROUP]
    hit, slot = (values >= cut[of, None]).nonzero(as_tuple=True)
    return of[hit], slot * grouped.shape[1] + group[hit], values[hit, slot]


def visiting_order(num_rows: int, height: int) -> list[tuple[int, int]]:
    """(start, stop) of all blocks, spread over the table by the golden ratio, so that a table
    sorted by score does not raise the threshold at every block."""
    count = -(-num_rows // height)
    order = sorted(range(count), key=lambda block: (block * 0.6180339887498949) % 1.0)
    return [(block * height, min((block + 1) * height, num_rows)) for block in order]

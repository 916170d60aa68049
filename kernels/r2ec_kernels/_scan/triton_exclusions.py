"""Excluded items as Triton kernels take them, prepared without a wait for the device."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .._dispatch import checks_enabled
from .._exact.excluded import TensorExclude, check_ids, check_offsets, split_exclude


@dataclass(frozen=True)
class Exclusions:
    """Rows that are not returned, or do not compete: query b's are ``rows[start[b]:start[b + 1]]``.

    Attributes:
        rows: int64 [E]; -1 for none. start: int64 [B + 1].
    """

    rows: torch.Tensor
    start: torch.Tensor

    def part(self, first: int, last: int) -> "Exclusions":
        """Those of the queries first .. last - 1; ``rows`` stays whole."""
        return Exclusions(self.rows, self.start[first : last + 1])

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and query of each pair, int64 [E]; row -1 for none, and for other parts' queries."""
        at = torch.arange(self.rows.numel(), device=self.rows.device)
        of = torch.searchsorted(self.start, at, right=True) - 1
        return torch.where((of < 0) | (of >= self.start.numel() - 1), -1, self.rows), of


def exclusions(
    exclude: TensorExclude, batch: int, num_ids: int, device: torch.device
) -> Exclusions | None:
    """Excluded ids on ``device``, without waiting for it: -1 stays where it was given.

    Ids that are given on another device, or under ``R2EC_CHECK=1``, are checked: ValueError unless
    they lie in -1..num_ids-1 and offsets begin at 0, do not fall, and end with the values.
    """
    values, offsets = split_exclude(exclude)
    if values is None or not values.numel():
        return None
    if checks_enabled() or values.device != device:
        check_ids(values, num_ids)
        if offsets is not None:
            check_offsets(offsets, values.numel())
    if offsets is None:
        start = torch.arange(batch + 1, device=device) * values.shape[1]
    else:
        start = offsets.to(device=device, dtype=torch.int64)
    return Exclusions(values.to(device=device, dtype=torch.int64).reshape(-1), start)


def at_places(excluded: Exclusions | None, place: torch.Tensor) -> Exclusions | None:
    """Exclusions by id as exclusions by row ``place[id]``; -1 stays, and so does a removed id's."""
    if excluded is None or not place.numel():
        return excluded
    rows = place[excluded.rows.clamp_min(0)]
    return Exclusions(torch.where(excluded.rows < 0, -1, rows), excluded.start)


def pairs_by_program(
    row: torch.Tensor,
    of: torch.Tensor,
    *,
    tile_rows: int,
    tile_queries: int,
    query_tiles: int,
    row_tiles: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Row, query) pairs in the order of tiles, and where each tile's begin.

    A tile of rows r and of queries q has the number ``r * query_tiles + q``; its pairs are those
    from ``start[number]`` to ``start[number + 1]``. Rows below 0 belong to none.
    """
    tiles = row_tiles * query_tiles
    number = row // tile_rows * query_tiles + of // tile_queries
    number, order = number.masked_fill_(row < 0, tiles).sort()
    start = torch.searchsorted(number, torch.arange(tiles + 1, device=row.device))
    return row[order], of[order], start


@triton.jit
def excluded_rows(b_row, i_m, exclude_ptr, exclude_start_ptr, BLOCK_E: tl.constexpr):
    """Whether each of a query's rows [ROWS] is excluded: int1 [ROWS]."""
    found = b_row < 0
    last = tl.load(exclude_start_ptr + i_m + 1)
    for first in range(tl.load(exclude_start_ptr + i_m), last, BLOCK_E):
        o_e = first + tl.arange(0, BLOCK_E)
        b_e = tl.load(exclude_ptr + o_e, mask=o_e < last, other=-1)
        found = found | (tl.sum((b_e[None, :] == b_row[:, None]).to(tl.int32), axis=1) > 0)
    return found

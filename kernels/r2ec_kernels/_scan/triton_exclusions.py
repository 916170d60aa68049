"""Excluded items as Triton kernels take them, prepared without a wait for the device."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .._dispatch import checks_enabled
from .._exact.excluded import TensorExclude, check_ids, check_offsets, split_exclude

_PLACE_BITS = tl.constexpr(7)  # of a row or a query in its tile
_PLACE_MASK = tl.constexpr(127)
_BLOCK_PAIRS = 1024


@dataclass(frozen=True)
class Exclusions:
    """Items that are not returned, or do not compete: query b's are ``ids[start[b]:start[b + 1]]``.

    Attributes:
        ids: int64 [E]; -1 for none. start: int64 [B + 1].
    """

    ids: torch.Tensor
    start: torch.Tensor

    def part(self, first: int, last: int) -> "Exclusions":
        """Those of the queries first .. last - 1; ``ids`` stays whole."""
        return Exclusions(self.ids, self.start[first : last + 1])


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
        start = offsets.to(device=device, dtype=torch.int64).contiguous()
    ids = values.to(device=device, dtype=torch.int64).reshape(-1)
    return Exclusions(ids.contiguous(), start)


@dataclass(frozen=True)
class TilePairs:
    """(Row, query) pairs in the order of a scan's tiles, as its programs visit them.

    A tile of rows r and of queries q has the number ``r * query_tiles + q``; its pairs are
    ``keys[start[number]:start[number + 1]]``.

    Attributes:
        keys: int64, ascending: the tile's number, the row's place in it (7 bits), the query's (7).
        start: int64 [tiles + 1].
    """

    keys: torch.Tensor
    start: torch.Tensor


def pairs_by_tile(
    excluded: Exclusions | None,
    batch: int,
    *,
    tile_rows: int,
    tile_queries: int,
    row_tiles: int,
    place: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
) -> TilePairs:
    """The pairs of exclusions, and of each query's own target where ``targets`` are given.

    Args:
        batch: B. tile_rows, tile_queries: at most 128.
        place: int64, the row of each excluded id, -1 for none; None: ids are rows.
        targets: int64 [B], rows; -1 for none.
    """
    assert max(tile_rows, tile_queries) <= 1 << _PLACE_BITS.value
    given = None if excluded is None else excluded.ids
    one = targets if given is None else given
    assert one is not None
    device = one.device
    num_excluded = 0 if given is None else given.numel()
    total = num_excluded + (0 if targets is None else batch)
    keys = torch.empty(total, dtype=torch.int64, device=device)
    query_tiles = triton.cdiv(batch, tile_queries)
    _pairs_kernel[(triton.cdiv(total, _BLOCK_PAIRS),)](
        rows_ptr=given,
        start_ptr=None if excluded is None else excluded.start,
        place_ptr=place,
        targets_ptr=targets,
        keys_ptr=keys,
        num_excluded=num_excluded,
        total=total,
        num_places=0 if place is None else place.numel(),
        batch=batch,
        query_tiles=query_tiles,
        TILE_ROWS=tile_rows,
        TILE_QUERIES=tile_queries,
        HAS_EXCLUDE=given is not None,
        HAS_PLACE=place is not None,
        HAS_TARGETS=targets is not None,
        BLOCK=_BLOCK_PAIRS,
        num_warps=4,
    )
    keys = keys.sort().values
    edges = torch.arange(row_tiles * query_tiles + 1, device=device) * (1 << 2 * _PLACE_BITS.value)
    return TilePairs(keys, torch.searchsorted(keys, edges))


@triton.jit
def _pairs_kernel(
    rows_ptr,
    start_ptr,
    place_ptr,
    targets_ptr,
    keys_ptr,
    num_excluded,
    total,
    num_places,
    batch,
    query_tiles,
    TILE_ROWS: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_PLACE: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys of ``TilePairs`` [total]: of the exclusions, then of the targets; -1 for none."""
    o_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_row = tl.full([BLOCK], -1, tl.int64)
    b_of = tl.zeros([BLOCK], tl.int64)
    if HAS_EXCLUDE:
        m_e = o_e < num_excluded
        b_row = tl.load(rows_ptr + o_e, mask=m_e, other=-1)
        if HAS_PLACE:
            m_known = (b_row >= 0) & (b_row < num_places)
            b_row = tl.load(place_ptr + b_row, mask=m_known, other=-1)
        # the last query whose pairs begin at or before this one
        b_low = tl.zeros([BLOCK], tl.int64)
        b_high = tl.full([BLOCK], 0, tl.int64) + batch
        for _ in range(32):
            b_mid = (b_low + b_high + 1) // 2
            m_move = b_low < b_high
            b_begin = tl.load(start_ptr + b_mid, mask=m_e & m_move, other=0)
            m_up = m_move & (b_begin <= o_e)
            b_low = tl.where(m_up, b_mid, b_low)
            b_high = tl.where(m_move & (m_up == 0), b_mid - 1, b_high)
        first = tl.load(start_ptr)
        # a part of a batch has pairs before and behind its own
        b_row = tl.where((o_e >= first) & (b_low < batch), b_row, -1)
        b_of = b_low
    if HAS_TARGETS:
        m_t = (o_e >= num_excluded) & (o_e < total)
        b_own = tl.load(targets_ptr + (o_e - num_excluded), mask=m_t, other=-1)
        b_row = tl.where(m_t, b_own, b_row)
        b_of = tl.where(m_t, o_e - num_excluded, b_of)
    b_tile = b_row // TILE_ROWS * query_tiles + b_of // TILE_QUERIES
    b_key = (b_tile << (2 * _PLACE_BITS)) + ((b_row % TILE_ROWS) << _PLACE_BITS)
    b_key = tl.where(b_row < 0, -1, b_key + b_of % TILE_QUERIES)
    tl.store(keys_ptr + o_e, b_key, mask=o_e < total)


@triton.jit
def pair_places(key):
    """The row's and the query's place in their tile, of a key of ``TilePairs``: int32."""
    row = (key >> _PLACE_BITS) & _PLACE_MASK
    return row.to(tl.int32), (key & _PLACE_MASK).to(tl.int32)


@triton.jit
def excluded_ids(b_id, i_m, exclude_ptr, exclude_start_ptr, BLOCK_E: tl.constexpr):
    """Whether each of a query's items [ROWS] is excluded, by its id: int1 [ROWS]."""
    found = b_id < 0
    last = tl.load(exclude_start_ptr + i_m + 1)
    for first in range(tl.load(exclude_start_ptr + i_m), last, BLOCK_E):
        o_e = first + tl.arange(0, BLOCK_E)
        b_e = tl.load(exclude_ptr + o_e, mask=o_e < last, other=-1)
        found = found | (tl.sum((b_e[None, :] == b_id[:, None]).to(tl.int32), axis=1) > 0)
    return found


def aot_configs() -> list[dict[str, Any]]:
    """The kernel's configurations, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    constants = {"TILE_ROWS": 128, "TILE_QUERIES": 16, "BLOCK": _BLOCK_PAIRS}
    constants |= dict.fromkeys(("HAS_EXCLUDE", "HAS_PLACE", "HAS_TARGETS"), True)
    signature = {}
    for name in _pairs_kernel.arg_names:
        kind = "*i64" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else kind
    return [
        {
            "name": "scan.pairs",
            "kernel": _pairs_kernel,
            "signature": signature,
            "constexprs": constants,
            "num_warps": 4,
            "num_stages": 1,
            "uses_tensor_cores": False,
            # 8 bytes read and written a pair, 8 for its place; the rest is in cache
            "work": {
                "sizes": "pairs=1024",
                "steps": 32,
                "bytes": 24 * _BLOCK_PAIRS / 32,
                "flops": 0,
            },
            "budget": {"loop": 195, "epilogue_shuffles": 0},
        }
    ]

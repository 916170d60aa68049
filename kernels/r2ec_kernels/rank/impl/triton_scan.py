"""Rank and log-sum-exp of a target among all items: one pass over the table on tensor cores.

For queries Q [M, d] (M = B) and items X [N, d], with s = q_m . x_n (cosine: / |x_n|), o the
target's own raw score and e(m, n) the error bound of s, it computes for every query

    ahead = sum_n [s > o + e]                        items certainly ahead of the target
    near-ties: the pairs (m, n) with |s - o| <= e    compared exactly afterwards (``triton_exact``)
    m = max(0, max_n x),  l = sum_n 2^(x - m),       x = (s - o) * logit, in units of log 2

over the items other than the excluded ones and the target, which is added afterwards.

Grid: ceil(M / BLOCK_M) tiles of queries x splits of the items, queries fastest: neighbours share a
split, so that the table is read once from memory, then from cache.
Tile: the product is written items x queries, [BLOCK_N, BLOCK_M] in steps of BLOCK_D columns: the
hardware's tile wants its long side on the left. A query of a 16-bit table is two numbers of its
type, high and low, and so two products; one of a float32 table is split by the hardware's
instruction (three products of TF32 parts). One pass serves the norm, the rank and the sum.
Reads N d + 2 M d elements from memory; writes 12 bytes a query and split, and 4 a near-tie. FLOPs:
4 M N d (float32: 6), N d for the norms, and about ten a score for m and l.
Numerics: every BLOCK_D columns go from the tensor cores' sum, which may truncate, to a float32
one: the error bound grows with BLOCK_D, not with d. One online softmax a split, merged in float64.
A row whose norm float32 cannot hold is unbounded: all queries are then left to ``triton_exact``.
The order of near-ties is that of atomic counters; only their set is used.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..._numbers import HUGE, UNIT
from ..._scan.triton_exclusions import pair_places
from ..._scan.triton_queries import DeviceQueries

_HUGE = tl.constexpr(HUGE)
_TENSOR_CORE_UNIT = 2.0**-22  # a term of a tensor-core sum, which may be truncated, not rounded
_TF32_UNIT = 2.0**-20  # what three products of TF32 parts miss


@dataclass(frozen=True)
class Tile:
    """block_m queries x block_n items x block_d columns a step."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


# By bytes of a number: for up to 16 queries, and for more. Larger tiles do not fit the registers:
# the table is read from cache again for every 32 (float32: 16) queries.
# A tile of 64 items has four warps: a second group of four would multiply the same again.
TILES = {
    2: (Tile(16, 64, 64, 4, 2), Tile(32, 128, 64, 8, 2)),
    4: (Tile(16, 64, 32, 4, 2), Tile(16, 64, 32, 4, 2)),
}
# where products do not lie in registers, and have to be brought there
SM_100_TILES = TILES | {2: (Tile(16, 64, 64, 4, 2), Tile(32, 64, 64, 8, 2))}
HIP_TILES = {
    2: (Tile(16, 64, 64, 4, 2), Tile(32, 64, 64, 4, 2)),
    4: (Tile(16, 64, 32, 4, 2), Tile(32, 64, 32, 4, 2)),
}

# Of ``aot --budget``, on sm_90, by queries of a tile, parts of them, and whether norms are taken:
# instructions of the loop and the epilogue, its shuffles and accesses to shared memory.
_BUDGET = {
    (16, True, False): (119, 1165, 44, 111),
    (16, True, True): (218, 1395, 64, 122),
    (32, True, False): (115, 1610, 84, 209),
    (32, True, True): (228, 1870, 106, 220),
    (16, False, False): (221, 1125, 44, 111),
    (16, False, True): (270, 1350, 64, 122),
}


@triton.jit
def stats_kernel(
    x_ptr,
    q_ptr,
    low_ptr,
    norm_ptr,
    bounds_ptr,
    limits_ptr,
    origin_ptr,
    logit_ptr,
    pair_ptr,
    pair_start_ptr,
    allowed_ptr,
    ahead_ptr,
    m_ptr,
    l_ptr,
    near_ptr,
    near_row_ptr,
    state_ptr,
    num_items,
    num_queries,
    d,
    tiles_per_split,
    room,
    stride_x,
    stride_q,
    unit,
    origin_unit,
    COSINE: tl.constexpr,
    TAKE_NORM: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A split of the items against a tile of queries.

    ahead, m, l: [splits, M]. near: int32 [M], near-ties of each query, from 0; near_row: int32 [M,
    room], their rows, as many as there is room for. The excluded pairs of a tile: see
    ``TilePairs``. allowed: int8 [N], 0 for a row that does not compete. state: int32 [M + 1], set
    to 1 at M where a row has no bound.
    """
    i_m, i_split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_queries
    # [BLOCK_M]: the target's raw score, log 2 units of a unit of raw score, and the two parts of
    # the error bound: size * |x| + floor
    b_origin = tl.load(origin_ptr + o_m, mask=m_m, other=0.0)
    b_logit = tl.load(logit_ptr + o_m, mask=m_m, other=0.0)
    b_length = tl.load(bounds_ptr + o_m, mask=m_m, other=0.0)
    b_missed = tl.load(bounds_ptr + 2 * num_queries + o_m, mask=m_m, other=0.0)
    b_floor = tl.load(bounds_ptr + 3 * num_queries + o_m, mask=m_m, other=0.0)
    b_size = 1.01 * (unit * b_length + b_missed)
    # both canonical roundings, that of the origin and of origin + error, origin - error
    b_floor += tl.abs(b_origin) * origin_unit + b_size * (2.0**-50)
    b_ahead = tl.zeros((BLOCK_M,), tl.int32)
    b_m = tl.zeros((BLOCK_M,), tl.float32)
    b_l = tl.zeros((BLOCK_M,), tl.float32)
    num_tiles = tl.cdiv(num_items, BLOCK_N)
    last = tl.minimum((i_split + 1) * tiles_per_split, num_tiles)
    if not TAKE_NORM:  # noqa: SIM102 - known when it is compiled
        if (tl.load(limits_ptr + 2) <= _HUGE) == 0:
            tl.store(state_ptr + num_queries, 1)
            last = last * 0
    for i_n in range(i_split * tiles_per_split, last):
        # 32-bit places in a tile whose base is 64-bit: pointers of a tile take half the registers
        o_n = tl.arange(0, BLOCK_N)
        m_n = o_n < num_items - i_n * BLOCK_N
        p_tile = x_ptr + i_n * BLOCK_N * stride_x
        b_s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        b_square = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, d, BLOCK_D):
            o_d = first + tl.arange(0, BLOCK_D)
            m_d = o_d < d
            # [BLOCK_N, BLOCK_D]
            p_x = p_tile + (o_n[:, None] * stride_x + o_d[None, :])
            b_x = tl.load(p_x, mask=m_n[:, None] & m_d[None, :], other=0.0)
            # [BLOCK_D, BLOCK_M]
            o_q = o_m[None, :] * stride_q + o_d[:, None]
            b_q = tl.load(q_ptr + o_q, mask=m_m[None, :] & m_d[:, None], other=0.0)
            if WIDEN:
                b_x, b_q = b_x.to(tl.float32), b_q.to(tl.float32)
            b_part = tl.dot(b_x, b_q, input_precision=PRECISION)
            if HAS_LOW:
                b_q = tl.load(low_ptr + o_q, mask=m_m[None, :] & m_d[:, None], other=0.0)
                if WIDEN:
                    b_q = b_q.to(tl.float32)
                b_s += tl.dot(b_x, b_q, input_precision=PRECISION)
            b_s += b_part
            if TAKE_NORM:
                b_wide = b_x.to(tl.float32)
                b_square += tl.sum(b_wide * b_wide, axis=1)
        if TAKE_NORM:
            b_norm = tl.sqrt(b_square)
            m_unbounded = m_n & ~(b_norm <= _HUGE)
            if COSINE:
                # A zero row scores 0 by the product; one too small for float32 has no bound.
                m_small = m_n & (b_norm < 1.0 / _HUGE)
                if tl.sum(m_small.to(tl.int32), axis=0) > 0:
                    b_most = tl.zeros((BLOCK_N,), tl.float32)
                    for first in range(0, d, BLOCK_D):
                        o_d = first + tl.arange(0, BLOCK_D)
                        p_x = p_tile + (o_n[:, None] * stride_x + o_d[None, :])
                        b_x = tl.load(p_x, mask=m_n[:, None] & (o_d < d)[None, :], other=0.0)
                        b_most = tl.maximum(b_most, tl.max(tl.abs(b_x.to(tl.float32)), axis=1))
                    m_unbounded = m_unbounded | (m_small & (b_most > 0))
            if tl.sum(m_unbounded.to(tl.int32), axis=0) > 0:
                tl.store(state_ptr + num_queries, 1)
        else:
            b_norm = tl.load(norm_ptr + i_n * BLOCK_N + o_n, mask=m_n, other=0.0)
        if COSINE:
            b_s = b_s * tl.where(b_norm > 0, 1.0 / tl.where(b_norm > 0, b_norm, 1.0), 0.0)[:, None]
            b_norm = tl.full((BLOCK_N,), 1.0, tl.float32)
        b_error = (b_norm * 1.001)[:, None] * b_size[None, :] + b_floor[None, :]
        m_alive = m_n[:, None] & m_m[None, :]
        if HAS_ALLOWED:
            b_allowed = tl.load(allowed_ptr + i_n * BLOCK_N + o_n, mask=m_n, other=0)
            m_alive = m_alive & (b_allowed != 0)[:, None]
        p_start = pair_start_ptr + i_n * tl.num_programs(0) + i_m
        for i_pair in range(tl.load(p_start), tl.load(p_start + 1)):
            row, of = pair_places(tl.load(pair_ptr + i_pair))
            m_pair = (o_n == row)[:, None] & (o_m == i_m * BLOCK_M + of)[None, :]
            m_alive = m_alive & ~m_pair
        m_ahead = m_alive & (b_s > b_origin[None, :] + b_error)
        b_ahead += tl.sum(m_ahead.to(tl.int32), axis=0)
        b_near = tl.where(m_alive & ~m_ahead & ~(b_s < b_origin[None, :] - b_error), 1, 0)
        if tl.sum(b_near) > 0:
            # [BLOCK_N, BLOCK_M]: each takes the next place of its query's list
            b_of = tl.broadcast_to(o_m[None, :], (BLOCK_N, BLOCK_M))
            b_place = tl.atomic_add(near_ptr + b_of, 1, mask=b_near > 0)
            b_row = tl.broadcast_to((o_n + i_n * BLOCK_N).to(tl.int32)[:, None], (BLOCK_N, BLOCK_M))
            p_row = near_row_ptr + b_of.to(tl.int64) * room + b_place
            tl.store(p_row, b_row, mask=(b_near > 0) & (b_place < room))
        b_s = tl.where(m_alive, (b_s - b_origin[None, :]) * b_logit[None, :], -float("inf"))
        b_above = tl.maximum(b_m, tl.max(b_s, axis=0))
        b_l = b_l * tl.exp2(b_m - b_above)
        b_l += tl.sum(tl.exp2(b_s - b_above[None, :]), axis=0)
        b_m = b_above
    o_out = i_split * num_queries + o_m
    tl.store(ahead_ptr + o_out, b_ahead, mask=m_m)
    tl.store(m_ptr + o_out, b_m, mask=m_m)
    tl.store(l_ptr + o_out, b_l, mask=m_m)


def tile_for(batch: int, rows: torch.Tensor) -> Tile:
    """The tile of a batch and a table."""
    tiles = HIP_TILES if torch.version.hip else TILES
    if rows.is_cuda and not torch.version.hip:
        major, _ = torch.cuda.get_device_capability(rows.device)
        tiles = SM_100_TILES if major >= 10 else TILES
    return tiles[rows.element_size()][batch > 16]


def scan_unit(query: DeviceQueries, rows: torch.Tensor, block_d: int) -> float:
    """Relative error of the kernel's scores to |q| |x|."""
    d = query.original.shape[1]
    steps = triton.cdiv(d, block_d)
    split = _TF32_UNIT if rows.dtype == torch.float32 else 0.0
    # canonical roundings and (cosine) the norm; the tensor cores' part of a step; the float32 sum
    rest = (0.5 * d + 16 if query.similarity == "cosine" else 12) * UNIT
    return 1.01 * (rest + (2 * block_d + 8) * _TENSOR_CORE_UNIT + split + 2 * steps * UNIT)


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ships, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    kinds = {"ahead_ptr": "*i32", "state_ptr": "*i32", "near_ptr": "*i32", "near_row_ptr": "*i32"}
    kinds |= {"allowed_ptr": "*i8", "unit": "fp32", "origin_unit": "fp32"}
    kinds |= dict.fromkeys(("pair_ptr", "pair_start_ptr"), "*i64")
    found = []
    shipped = (
        ("cuda", ("sm_80", "sm_90"), TILES),
        ("cuda", ("sm_100",), SM_100_TILES),
        ("hip", ("gfx942",), HIP_TILES),
    )
    for kind, (backend, targets, tiles) in itertools.product(("bf16", "fp16", "fp32"), shipped):
        size = 4 if kind == "fp32" else 2
        flags = ((False, False), (True, False), (False, True))
        for tile, (taken, allowed) in itertools.product(dict.fromkeys(tiles[size]), flags):
            constants = {
                "COSINE": True,
                "TAKE_NORM": taken,
                "HAS_LOW": size == 2,
                "HAS_ALLOWED": allowed,
                "PRECISION": "tf32x3" if kind == "fp32" and backend == "cuda" else "ieee",
                "WIDEN": False,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_D": tile.block_d,
            }
            types = kinds | dict.fromkeys(("x_ptr", "q_ptr", "low_ptr"), f"*{kind}")
            found.append(_case(constants, types, tile, backend) | {"targets": targets})
            if "sm_90" in targets and not allowed:
                found[-1]["budget"] = _budget(tile, constants)
    return found


def _case(
    constants: dict[str, Any], types: dict[str, str], tile: Tile, backend: str
) -> dict[str, Any]:
    signature = {}
    for name in stats_kernel.arg_names:
        kind = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, kind)
    return {
        "name": "rank.stats",
        "kernel": stats_kernel,
        "signature": signature,
        "constexprs": constants,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "uses_tensor_cores": backend == "cuda" or types["x_ptr"] != "*fp32",
        "backend": backend,
        "aligned": ("stride_x", "stride_q", "d"),
        "work": _work(tile, 4 if types["x_ptr"] == "*fp32" else 2),
    }


def _budget(tile: Tile, constants: dict[str, Any]) -> dict[str, Any]:
    """What the code holds on sm_90: 3 to 5% above its counts, and no product more than it needs."""
    low = constants["HAS_LOW"]
    loop, epilogue, shuffles, shared = _BUDGET[tile.block_m, low, constants["TAKE_NORM"]]
    products = 2 if low else 6  # three of TF32 parts, at half the rate
    return {
        "loop": loop,
        "epilogue": epilogue,
        "epilogue_shuffles": shuffles,
        "epilogue_shared": shared,
        "product_flops": products * 2 * tile.block_m * tile.block_n * tile.block_d,
        "wgmma": True,
    }


def _work(tile: Tile, itemsize: int, d: int = 1024) -> dict[str, Any]:
    """What a tile of one tile of queries needs; near-ties and excluded pairs are few."""
    return {
        "sizes": f"B={tile.block_m} d={d}",
        "steps": d // tile.block_d,
        "bytes": tile.block_n * tile.block_d * itemsize,
        "flops": 2 * tile.block_m * tile.block_n * tile.block_d,
        "scores": tile.block_m * tile.block_n,
    }

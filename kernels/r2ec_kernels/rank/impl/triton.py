"""Rank and log-sum-exp of a target among all items, in one kernel.

For queries Q [M, d] (M = B) and items X [N, d], with s = q_m . x_n (cosine: / |x_n|), o the
target's own raw score and e(m, n) the error bound of s, it computes for every query

    ahead = sum_n [s > o + e]                        items certainly ahead of the target
    near-ties: the pairs (m, n) with |s - o| <= e    compared exactly afterwards (``count_ahead``)
    m = max(0, max_n x),  l = sum_n 2^(x - m),       x = (s - o) * logit, in units of log 2

over the items other than the excluded ones and the target, which the launcher adds itself.

Grid: ceil(M / BLOCK_M) tiles of queries x splits of the items, queries fastest: neighbours share a
split, so that the table is read once from memory, then from cache.
Tile: the product is written items x queries, [BLOCK_N, BLOCK_M] in steps of BLOCK_D columns: the
hardware's tile wants its long side on the left. It is the largest tile that no target's compiler
spills; one product serves the norm, the rank and the sum.
Reads N d + M d elements from memory; writes 12 bytes a query and split, and 16 a near-tie. FLOPs:
2 M N d, N d for the norms, and about ten a score for m and l.
Numerics: float32 products (CUDA: three products of TF32 parts, in the bound), one online softmax a
split, merged by the launcher in float64. A row whose norm float32 cannot hold is unbounded: it is
counted, and the caller takes the dense path. The order of near-ties is that of an atomic counter;
only their set is used.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from ..._exact.bounds import Queries, prepare_queries
from ..._exact.excluded import ExcludedPairs
from ..._exact.scores import canonical_scores
from ..._exact.table import Table
from ..._numbers import HUGE, LOG2_E, UNIT
from .common import Origin, count_ahead, dense_stats, overflows

# of a tile
BLOCK_ITEMS, BLOCK_QUERIES, BLOCK_WIDTH = 64, 16, 32
WARPS, STAGES = 8, 2
PROGRAMS = 528  # a few rounds of one on each multiprocessor
CAPACITY = 1 << 16  # near-ties kept for an exact comparison; more take the dense path
BLOCK_SIZES = ("BLOCK_ITEMS", "BLOCK_QUERIES", "PROGRAMS", "CAPACITY")  # that tests may change
# float32 as three products of 10-bit parts on tensor cores: what the parts miss, and sums that may
# be truncated instead of rounded
_SPLIT_UNIT, _TENSOR_CORE_UNIT = 2.0**-20, 2.0**-22
_PRECISION = {"cuda": "tf32x3", "hip": "ieee"}
# of ``aot --budget``: what the code holds on sm_90, 3 to 5% above; tightened as it improves
_BUDGET = {"loop": 420, "epilogue": 1270, "epilogue_shuffles": 43, "epilogue_shared": 170}


@triton.jit
def _stats_kernel(
    x_ptr,
    q_ptr,
    origin_ptr,
    logit_ptr,
    size_ptr,
    floor_ptr,
    pair_row_ptr,
    pair_of_ptr,
    pair_start_ptr,
    ahead_ptr,
    m_ptr,
    l_ptr,
    near_of_ptr,
    near_row_ptr,
    counter_ptr,
    num_items,
    num_queries,
    d,
    tiles_per_split,
    capacity,
    stride_x,
    stride_q,
    largest,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A split of the items against a tile of queries.

    ahead, m, l: [splits, M]. near_of, near_row: int64 [capacity]. counter: int32, [near-ties, tiles
    with unbounded rows]. The excluded pairs of tile i are pair_start[i] .. pair_start[i + 1] - 1.
    """
    i_m, i_split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < num_queries
    # [BLOCK_M]: the target's raw score, log 2 units of a unit of raw score, and the two parts of
    # the error bound: size * |x| + floor
    b_origin = tl.load(origin_ptr + o_m, mask=m_m, other=0.0)
    b_logit = tl.load(logit_ptr + o_m, mask=m_m, other=0.0)
    b_size = tl.load(size_ptr + o_m, mask=m_m, other=0.0)
    b_floor = tl.load(floor_ptr + o_m, mask=m_m, other=0.0)
    b_ahead = tl.zeros((BLOCK_M,), tl.int32)
    b_m = tl.zeros((BLOCK_M,), tl.float32)
    b_l = tl.zeros((BLOCK_M,), tl.float32)
    num_tiles = tl.cdiv(num_items, BLOCK_N)
    last = tl.minimum((i_split + 1) * tiles_per_split, num_tiles)
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
            b_x = tl.load(p_x, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            # [BLOCK_D, BLOCK_M]
            p_q = q_ptr + o_m[None, :] * stride_q + o_d[:, None]
            b_q = tl.load(p_q, mask=m_m[None, :] & m_d[:, None], other=0.0)
            b_s = tl.dot(b_x, b_q, b_s, input_precision=PRECISION)
            b_square += tl.sum(b_x * b_x, axis=1)
        b_norm = tl.sqrt(b_square)
        m_unbounded = m_n & ~(b_norm <= largest)
        if COSINE:
            m_unbounded = m_unbounded | (m_n & (b_norm < 1.0 / largest))
            b_s = b_s * tl.where(b_norm > 0, 1.0 / b_norm, 0.0)[:, None]
            b_norm = tl.full((BLOCK_N,), 1.0, tl.float32)
        if tl.sum(m_unbounded.to(tl.int32)) > 0:
            tl.atomic_add(counter_ptr + 1, 1)
        b_error = b_norm[:, None] * b_size[None, :] + b_floor[None, :]
        m_alive = m_n[:, None] & m_m[None, :]
        begin, end = tl.load(pair_start_ptr + i_n), tl.load(pair_start_ptr + i_n + 1)
        for i_pair in range(begin, end):
            row, of = tl.load(pair_row_ptr + i_pair), tl.load(pair_of_ptr + i_pair)
            m_alive = m_alive & ~((o_n == row - i_n * BLOCK_N)[:, None] & (o_m == of)[None, :])
        m_ahead = m_alive & (b_s > b_origin[None, :] + b_error)
        b_ahead += tl.sum(m_ahead.to(tl.int32), axis=0)
        b_near = tl.where(m_alive & ~m_ahead & (b_s >= b_origin[None, :] - b_error), 1, 0)
        count = tl.sum(b_near)
        if count > 0:
            # [BLOCK_N, BLOCK_M]: query by query; the order of the places does not matter
            b_count = tl.sum(b_near, axis=0)
            b_before = tl.cumsum(b_count, 0) - b_count
            o_near = tl.cumsum(b_near, 0) - 1 + b_before[None, :]
            o_near = o_near + tl.atomic_add(counter_ptr, count)
            m_near = (b_near > 0) & (o_near < capacity)
            b_row = i_n * BLOCK_N + tl.broadcast_to(o_n[:, None], (BLOCK_N, BLOCK_M))
            tl.store(near_row_ptr + o_near, b_row, mask=m_near)
            b_of = tl.broadcast_to(o_m[None, :], (BLOCK_N, BLOCK_M)).to(tl.int64)
            tl.store(near_of_ptr + o_near, b_of, mask=m_near)
        b_s = tl.where(m_alive, (b_s - b_origin[None, :]) * b_logit[None, :], -float("inf"))
        b_above = tl.maximum(b_m, tl.max(b_s, axis=0))
        b_l = b_l * tl.exp2(b_m - b_above)
        b_l += tl.sum(tl.exp2(b_s - b_above[None, :]), axis=0)
        b_m = b_above
    o_out = i_split * num_queries + o_m
    tl.store(ahead_ptr + o_out, b_ahead, mask=m_m)
    tl.store(m_ptr + o_out, b_m, mask=m_m)
    tl.store(l_ptr + o_out, b_l, mask=m_m)


def target_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    exclude_values: torch.Tensor,
    exclude_offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) over a plain table."""
    query = prepare_queries(queries, similarity, temperature)
    excluded = ExcludedPairs.from_offsets(exclude_values, exclude_offsets).without(targets)
    own = canonical_scores(queries, items[targets][:, None], similarity, temperature)[:, 0]
    found = None
    bounded = ~query.dense & torch.isfinite(own)
    if targets.numel() and similarity != "l2" and bool(bounded.all()):
        found = _scan(items, query, own, targets, excluded)
    if found is None or bool(overflows(own, found[1]).any()):
        found = dense_stats(Table(items), query, own, targets, excluded)
    return found


def _scan(
    items: torch.Tensor,
    query: Queries,
    target: torch.Tensor,
    targets: torch.Tensor,
    excluded: ExcludedPairs,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The kernel's scan; None where it cannot be exact (unbounded rows, too many near-ties)."""
    (count, d), batch, device = items.shape, targets.shape[0], items.device
    on_cuda = device.type == "cuda" and torch.version.hip is None
    precision = _PRECISION["cuda" if on_cuda else "hip"]
    if precision == "tf32x3":
        query = replace(query, unit=query.unit + _SPLIT_UNIT + d * _TENSOR_CORE_UNIT)
    items = items if items.stride(1) == 1 else items.contiguous()
    origin = Origin.of(query, items[targets])
    size = query.unit * query.norm * 1.001
    # both canonical roundings, that of the origin and of origin + error, origin - error
    floor = query.floor + origin.raw.abs().float() * 6 * UNIT + size * d**0.5 * 2.0**-62
    pairs = excluded.adding(targets)
    tiles = triton.cdiv(count, BLOCK_ITEMS)
    edges = torch.arange(tiles + 1, device=device) * BLOCK_ITEMS
    pair_start = torch.searchsorted(pairs.rows, edges)
    query_tiles = triton.cdiv(batch, BLOCK_QUERIES)
    splits = max(1, min(tiles, PROGRAMS // query_tiles))
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    ahead = torch.empty(splits, batch, dtype=torch.int32, device=device)
    m, l = torch.empty(2, splits, batch, device=device)
    near_ties = torch.empty(2, CAPACITY, dtype=torch.int64, device=device)
    counter = torch.zeros(2, dtype=torch.int32, device=device)
    _stats_kernel[(query_tiles, splits)](
        x_ptr=items,
        q_ptr=query.scaled,
        origin_ptr=origin.rounded,
        logit_ptr=origin.logit,
        size_ptr=size,
        floor_ptr=floor,
        pair_row_ptr=pairs.rows,
        pair_of_ptr=pairs.of,
        pair_start_ptr=pair_start,
        ahead_ptr=ahead,
        m_ptr=m,
        l_ptr=l,
        near_of_ptr=near_ties[0],
        near_row_ptr=near_ties[1],
        counter_ptr=counter,
        num_items=count,
        num_queries=batch,
        d=d,
        tiles_per_split=per_split,
        capacity=CAPACITY,
        stride_x=items.stride(0),
        stride_q=query.scaled.stride(0),
        largest=HUGE,
        COSINE=query.similarity == "cosine",
        PRECISION=precision,
        BLOCK_M=BLOCK_QUERIES,
        BLOCK_N=BLOCK_ITEMS,
        BLOCK_D=BLOCK_WIDTH,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    num_near_ties, unbounded = counter.tolist()
    if unbounded or num_near_ties > CAPACITY:
        return None
    of, at = near_ties[:, :num_near_ties]
    rank = 1 + ahead.sum(0) + count_ahead(Table(items), query, target, targets, of, at)
    top = m.amax(0).double()
    total = (l.double() * (m.double() - top).exp2()).sum(0)
    total += (origin.moved - top).exp2()
    return rank, ((origin.moved - top - total.log2()) / LOG2_E).float()


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ships, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    tile = {"BLOCK_N": BLOCK_ITEMS, "BLOCK_M": BLOCK_QUERIES, "BLOCK_D": BLOCK_WIDTH}
    found = []
    for table in ("fp32", "bf16", "fp16"):
        for cosine in (False, True):
            for backend, precision in _PRECISION.items():
                constants = tile | {"COSINE": cosine, "PRECISION": precision}
                case = _aot(_stats_kernel, table, constants, WARPS, STAGES)
                case |= {"backend": backend, "uses_tensor_cores": backend == "cuda"}
                bits = 32 if table == "fp32" else 16
                case["budget"] = _BUDGET | {"load_bits": bits, "wgmma": True}
                found.append(case | {"work": _work(bits // 8)})
    return found


def _work(itemsize: int, d: int = 1024) -> dict[str, Any]:
    """What a tile of one tile of queries needs; near-ties and excluded pairs are few."""
    return {
        "sizes": f"B={BLOCK_QUERIES} d={d}",
        "steps": d // BLOCK_WIDTH,
        "bytes": BLOCK_ITEMS * BLOCK_WIDTH * itemsize,
        "flops": 2 * BLOCK_QUERIES * BLOCK_ITEMS * BLOCK_WIDTH,
        "scores": BLOCK_QUERIES * BLOCK_ITEMS,
    }


def _aot(
    kernel: Any, table: str, constexprs: dict[str, Any], warps: int, stages: int
) -> dict[str, Any]:
    kinds = {
        "x_ptr": f"*{table}",
        "ahead_ptr": "*i32",
        "counter_ptr": "*i32",
        "largest": "fp32",
    }
    kinds |= dict.fromkeys(
        ("pair_row_ptr", "pair_of_ptr", "pair_start_ptr", "near_of_ptr", "near_row_ptr"), "*i64"
    )
    signature = {}
    for name in kernel.arg_names:
        kind = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constexprs else kinds.get(name, kind)
    return {
        "name": f"rank.{kernel.fn.__name__.strip('_')}",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": warps,
        "num_stages": stages,
        "uses_tensor_cores": False,
    }

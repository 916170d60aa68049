"""Rank and log-sum-exp in one pass over the items, in Triton."""

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
from .common import Origin, count_ahead, dense_stats

# the largest tile that no target's compiler spills
BLOCK_ITEMS, BLOCK_QUERIES, BLOCK_WIDTH = 64, 16, 32
WARPS, STAGES = 8, 2
PROGRAMS = 528  # a few rounds of one on each multiprocessor
CAPACITY = 1 << 16  # near-ties kept for an exact comparison; more take the dense path
BLOCK_SIZES = ("BLOCK_ITEMS", "BLOCK_QUERIES", "PROGRAMS", "CAPACITY")  # that tests may change
# float32 as three products of 10-bit parts on tensor cores: what the parts miss, and sums that may
# be truncated instead of rounded
_SPLIT_UNIT, _TENSOR_CORE_UNIT = 2.0**-20, 2.0**-22
_PRECISION = {"cuda": "tf32x3", "hip": "ieee"}


@triton.jit
def _stats_kernel(
    x_ptr,
    q_ptr,
    low_ptr,
    origin_ptr,
    logit_ptr,
    size_ptr,
    floor_ptr,
    pair_row_ptr,
    pair_of_ptr,
    pair_start_ptr,
    ahead_ptr,
    peak_ptr,
    mass_ptr,
    near_of_ptr,
    near_row_ptr,
    counter_ptr,
    num_rows,
    batch,
    d,
    tiles_per_split,
    capacity,
    stride_x,
    stride_q,
    largest,
    COSINE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A split of the items against a tile of queries. counter: [near-ties, untrusted rows]."""
    # neighbours share a split of the items: the table is read once from memory, then from cache
    i_b, i_split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_b = i_b * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_b < batch
    # [BLOCK_B]: limits are raw scores relative to nothing; the rest to the target's
    raw = tl.load(low_ptr + o_b, mask=m_b, other=0.0)
    origin = tl.load(origin_ptr + o_b, mask=m_b, other=0.0)
    logit = tl.load(logit_ptr + o_b, mask=m_b, other=0.0)
    size = tl.load(size_ptr + o_b, mask=m_b, other=0.0)
    floor = tl.load(floor_ptr + o_b, mask=m_b, other=0.0)
    ahead = tl.zeros((BLOCK_B,), tl.int32)
    peak = tl.zeros((BLOCK_B,), tl.float32)
    mass = tl.zeros((BLOCK_B,), tl.float32)
    num_tiles = tl.cdiv(num_rows, BLOCK_N)
    last = tl.minimum((i_split + 1) * tiles_per_split, num_tiles)
    for i_n in range(i_split * tiles_per_split, last):
        # 32-bit places in a tile whose base is 64-bit: pointers of a tile take half the registers
        o_n = tl.arange(0, BLOCK_N)
        m_n = o_n < num_rows - i_n * BLOCK_N
        p_tile = x_ptr + i_n * BLOCK_N * stride_x
        scores = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
        square = tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, d, BLOCK_D):
            o_d = first + tl.arange(0, BLOCK_D)
            m_d = o_d < d
            # [BLOCK_N, BLOCK_D]
            p_x = p_tile + (o_n[:, None] * stride_x + o_d[None, :])
            x = tl.load(p_x, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            # [BLOCK_D, BLOCK_B]
            p_q = q_ptr + o_b[None, :] * stride_q + o_d[:, None]
            q = tl.load(p_q, mask=m_b[None, :] & m_d[:, None], other=0.0)
            scores = tl.dot(x, q, scores, input_precision=PRECISION)
            square += tl.sum(x * x, axis=1)
        norm = tl.sqrt(square)
        untrusted = m_n & ~(norm <= largest)
        if COSINE:
            untrusted = untrusted | (m_n & (norm < 1.0 / largest))
            scores = scores * tl.where(norm > 0, 1.0 / norm, 0.0)[:, None]
            norm = tl.full((BLOCK_N,), 1.0, tl.float32)
        if tl.sum(untrusted.to(tl.int32)) > 0:
            tl.atomic_add(counter_ptr + 1, 1)
        error = norm[:, None] * size[None, :] + floor[None, :]
        alive = m_n[:, None] & m_b[None, :]
        begin, end = tl.load(pair_start_ptr + i_n), tl.load(pair_start_ptr + i_n + 1)
        for i_pair in range(begin, end):
            row, of = tl.load(pair_row_ptr + i_pair), tl.load(pair_of_ptr + i_pair)
            alive = alive & ~((o_n == row - i_n * BLOCK_N)[:, None] & (o_b == of)[None, :])
        above = alive & (scores > raw[None, :] + error)
        ahead += tl.sum(above.to(tl.int32), axis=0)
        near = tl.where(alive & ~above & (scores >= raw[None, :] - error), 1, 0)
        count = tl.sum(near)
        if count > 0:
            # [BLOCK_N, BLOCK_B]: query by query, the order of the places does not matter
            per_query = tl.sum(near, axis=0)
            before = tl.cumsum(per_query, 0) - per_query
            place = tl.cumsum(near, 0) - 1 + before[None, :] + tl.atomic_add(counter_ptr, count)
            m_near = (near > 0) & (place < capacity)
            row_of = i_n * BLOCK_N + tl.broadcast_to(o_n[:, None], (BLOCK_N, BLOCK_B))
            tl.store(near_row_ptr + place, row_of, mask=m_near)
            query_of = tl.broadcast_to(o_b[None, :], (BLOCK_N, BLOCK_B)).to(tl.int64)
            tl.store(near_of_ptr + place, query_of, mask=m_near)
        x2 = tl.where(alive, (scores - origin[None, :]) * logit[None, :], -float("inf"))
        higher = tl.maximum(peak, tl.max(x2, axis=0))
        mass = mass * tl.exp2(peak - higher)
        mass += tl.sum(tl.exp2(x2 - higher[None, :]), axis=0)
        peak = higher
    o_out = i_split * batch + o_b
    tl.store(ahead_ptr + o_out, ahead, mask=m_b)
    tl.store(peak_ptr + o_out, peak, mask=m_b)
    tl.store(mass_ptr + o_out, mass, mask=m_b)


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
    trusted = ~query.dense & torch.isfinite(own)
    if targets.numel() and similarity != "l2" and bool(trusted.all()):
        found = _scan(items, query, own, targets, excluded)
    if found is None:
        found = dense_stats(Table(items), query, own, targets, excluded)
    return found


def _scan(
    items: torch.Tensor,
    query: Queries,
    target: torch.Tensor,
    targets: torch.Tensor,
    excluded: ExcludedPairs,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The kernel's pass; None where it cannot be exact (untrusted rows, too many near-ties)."""
    (num, d), batch, device = items.shape, targets.shape[0], items.device
    on_cuda = device.type == "cuda" and torch.version.hip is None
    precision = _PRECISION["cuda" if on_cuda else "hip"]
    if precision == "tf32x3":
        query = replace(query, unit=query.unit + _SPLIT_UNIT + d * _TENSOR_CORE_UNIT)
    items = items if items.stride(1) == 1 else items.contiguous()
    origin = Origin.of(query, items[targets])
    size = query.unit * query.norm * 1.001
    # both canonical roundings, that of ``raw`` and of the two limits
    floor = query.floor + origin.raw.abs().float() * 6 * UNIT + size * d**0.5 * 2.0**-62
    pairs = excluded.adding(targets)
    tiles = triton.cdiv(num, BLOCK_ITEMS)
    edges = torch.arange(tiles + 1, device=device) * BLOCK_ITEMS
    pair_start = torch.searchsorted(pairs.rows, edges)
    columns = triton.cdiv(batch, BLOCK_QUERIES)
    splits = max(1, min(tiles, PROGRAMS // columns))
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    ahead = torch.empty(splits, batch, dtype=torch.int32, device=device)
    peak, mass = torch.empty(2, splits, batch, device=device)
    near = torch.empty(2, CAPACITY, dtype=torch.int64, device=device)
    counter = torch.zeros(2, dtype=torch.int32, device=device)
    _stats_kernel[(columns, splits)](
        items,
        query.scaled,
        origin.rounded,
        origin.rounded,
        origin.logit,
        size,
        floor,
        pairs.rows,
        pairs.of,
        pair_start,
        ahead,
        peak,
        mass,
        near[0],
        near[1],
        counter,
        num,
        batch,
        d,
        per_split,
        CAPACITY,
        items.stride(0),
        query.scaled.stride(0),
        HUGE,
        COSINE=query.similarity == "cosine",
        PRECISION=precision,
        BLOCK_N=BLOCK_ITEMS,
        BLOCK_B=BLOCK_QUERIES,
        BLOCK_D=BLOCK_WIDTH,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    num_near, untrusted = counter.tolist()
    if untrusted or num_near > CAPACITY:
        return None
    of, at = near[:, :num_near]
    rank = 1 + ahead.sum(0) + count_ahead(Table(items), query, target, targets, of, at)
    top = peak.amax(0).double()
    total = (mass.double() * (peak.double() - top).exp2()).sum(0)
    total += (origin.moved - top).exp2()
    return rank, ((origin.moved - top - total.log2()) / LOG2_E).float()


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ships, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    tile = {"BLOCK_N": BLOCK_ITEMS, "BLOCK_B": BLOCK_QUERIES, "BLOCK_D": BLOCK_WIDTH}
    found = []
    for table in ("fp32", "bf16", "fp16"):
        for cosine in (False, True):
            for backend, precision in _PRECISION.items():
                constants = tile | {"COSINE": cosine, "PRECISION": precision}
                case = _aot(_stats_kernel, table, constants, WARPS, STAGES)
                found.append(case | {"backend": backend, "uses_tensor_cores": backend == "cuda"})
    return found


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

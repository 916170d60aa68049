"""The coarse scan on tensor cores: the two best scores of every group of rows, in one kernel.

For queries Q [M, d] (M = B) and the rows X [N, d] of a copy of the table it computes

    s[m, n] = mul[n] (q_m . x_n) - sub[n],          -inf for excluded pairs,

and keeps, for every query and every group of ``GROUP`` consecutive rows, the largest and the second
largest s, each packed with its row's place in the group into an int32 (the low bits of the score
give way). Nothing of size [M, N] is stored, and there are no atomics. Where the rows themselves are
scanned, mul and sub follow from their norms, which are given or taken from the same tiles.

Grid: ceil(M / BLOCK_M) * ceil(N / BLOCK_N) programs in one dimension, queries fastest: programs
that run together share a tile of items, which memory delivers once.
Tile: items are the long side. The product is written items x queries, [BLOCK_N, BLOCK_M] in steps
of BLOCK_K columns, because the hardware's tile wants at least 64 rows on its left side and a batch
may have 16 queries or fewer.
Reads N d + M d elements from memory (the items again from cache for every tile of queries) and up
to 8 bytes a row for norms, mul and sub; writes 8 M N / GROUP bytes. FLOPs: 2 M N d, and N d for
norms.
Numerics: accumulated in float32 (float32 operands as three bfloat16 products); ``product_unit``
bounds the error, of tensor-core sums that may truncate and of the packing. Excluded pairs come
sorted by program, so each program visits its own and they cost no kept score.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._numbers import HUGE
from ..._scan.triton_exclusions import Exclusions, TilePairs, pair_places, pairs_by_tile
from .launch import Launch, choose

GROUPS = (32, 128)  # rows of a group
LOWEST = tl.constexpr(-(2**31))
_HUGE = tl.constexpr(HUGE)
PACK_UNIT = 2.0**-15  # group index in the low bits of a score: at most 7 bits of 24
_TENSOR_CORE_UNIT = 2.0**-22  # a term of a tensor-core sum, which may be truncated, not rounded
_SPLIT_UNIT = 2.0**-15  # float32 operands as sums of two bfloat16


@triton.jit
def group_best_kernel(
    x_ptr,
    q_ptr,
    mul_ptr,
    sub_ptr,
    norm_ptr,
    tile_norm_ptr,
    pair_ptr,
    pair_start_ptr,
    first_ptr,
    second_ptr,
    num_items,
    num_queries,
    d,
    stride_x,
    stride_q,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_MUL: tl.constexpr,
    HAS_SUB: tl.constexpr,
    BY_NORM: tl.constexpr,
    TAKE_NORM: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of items against a tile of queries.

    first, second: int32 [M, ceil(N / GROUP)]. The program's excluded pairs are those numbered
    pair_start[program] .. pair_start[program + 1] - 1. BY_NORM: what a norm does to a score,
    "none", "cosine" or "l2". TAKE_NORM: take the norms here, and write the largest of the tile to
    tile_norm[i_n], infinity where one has no bound.
    """
    i_m = tl.program_id(0) % tl.cdiv(num_queries, BLOCK_M)
    i_n = tl.program_id(0) // tl.cdiv(num_queries, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < num_items
    m_m = o_m < num_queries
    p_x = x_ptr + o_n.to(tl.int64)[:, None] * stride_x + o_k[None, :]
    p_q = q_ptr + o_m.to(tl.int64)[None, :] * stride_q + o_k[:, None]
    b_s = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    b_square = tl.zeros([BLOCK_N], dtype=tl.float32)
    for k in range(0, d, BLOCK_K):
        # [BLOCK_N, BLOCK_K] items, [BLOCK_K, BLOCK_M] queries
        if EVEN_K:
            b_x = tl.load(p_x + k, mask=m_n[:, None], other=0)
            b_q = tl.load(p_q + k, mask=m_m[None, :], other=0)
        else:
            m_k = k + o_k < d
            b_x = tl.load(p_x + k, mask=m_n[:, None] & m_k[None, :], other=0)
            b_q = tl.load(p_q + k, mask=m_m[None, :] & m_k[:, None], other=0)
        if WIDEN:
            b_x, b_q = b_x.to(tl.float32), b_q.to(tl.float32)
        else:
            b_x = b_x.to(b_q.dtype)
        b_s = tl.dot(b_x, b_q, b_s, input_precision=PRECISION)
        if TAKE_NORM:
            b_wide = b_x.to(tl.float32)
            b_square += tl.sum(b_wide * b_wide, axis=1)
    # [BLOCK_N]
    if TAKE_NORM:
        b_norm = tl.sqrt(b_square)
        b_bound = tl.where(b_norm <= _HUGE, b_norm, float("inf"))
        if BY_NORM == "cosine":
            # A zero row scores 0 by the product alone; one too small for float32 has no bound.
            m_small = m_n & (b_norm < 1.0 / _HUGE)
            if tl.sum(m_small.to(tl.int32), axis=0) > 0:
                b_largest = tl.zeros([BLOCK_N], dtype=tl.float32)
                for k in range(0, d, BLOCK_K):
                    m_k = k + o_k < d
                    b_x = tl.load(p_x + k, mask=m_n[:, None] & m_k[None, :], other=0)
                    b_largest = tl.maximum(b_largest, tl.max(tl.abs(b_x.to(tl.float32)), axis=1))
                b_bound = tl.where(m_small & (b_largest > 0), float("inf"), b_bound)
        tl.store(tile_norm_ptr + i_n, tl.max(b_bound, axis=0))
    elif BY_NORM != "none":
        b_norm = tl.load(norm_ptr + o_n, mask=m_n, other=0)
    if BY_NORM == "cosine":
        b_s = b_s * tl.where(b_norm > 0, 1.0 / tl.where(b_norm > 0, b_norm, 1.0), 0.0)[:, None]
    elif BY_NORM == "l2":
        b_s = b_s - (0.5 * b_norm * b_norm)[:, None]
    if HAS_MUL:
        b_s = b_s * tl.load(mul_ptr + o_n, mask=m_n, other=0)[:, None]
    if HAS_SUB:
        b_s = b_s - tl.load(sub_ptr + o_n, mask=m_n, other=0)[:, None]
    # Signed integers in the order of the floats; the low bits say which row of the group it is.
    b_i = b_s.to(tl.int32, bitcast=True)
    b_i = b_i ^ ((b_i >> 31) & 0x7FFFFFFF)
    b_i = (b_i & -GROUP) | (o_n % GROUP)[:, None]
    b_i = tl.where(m_n[:, None], b_i, LOWEST)
    if HAS_PAIRS:
        for i_pair in range(
            tl.load(pair_start_ptr + tl.program_id(0)),
            tl.load(pair_start_ptr + tl.program_id(0) + 1),
        ):
            row, of = pair_places(tl.load(pair_ptr + i_pair))
            m_row, m_query = o_n == i_n * BLOCK_N + row, o_m == i_m * BLOCK_M + of
            b_i = tl.where(m_row[:, None] & m_query[None, :], LOWEST, b_i)
    # [groups, GROUP, BLOCK_M]
    b_i = tl.reshape(b_i, [BLOCK_N // GROUP, GROUP, BLOCK_M])
    b_first = tl.max(b_i, axis=1)
    b_second = tl.max(tl.where(b_i == b_first[:, None, :], LOWEST, b_i), axis=1)
    o_g = i_n * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    m_g = (o_g < tl.cdiv(num_items, GROUP))[:, None] & m_m[None, :]
    o_out = o_m.to(tl.int64)[None, :] * tl.cdiv(num_items, GROUP) + o_g[:, None]
    tl.store(first_ptr + o_out, b_first, mask=m_g)
    tl.store(second_ptr + o_out, b_second, mask=m_g)


@dataclass(frozen=True)
class Scanned:
    """What the kernel multiplies, and what its scores may be off by.

    Attributes:
        codes: [N, >= d], float32, bfloat16, float16 or int8: the rows, or what stands for them.
        mul, sub: float32 [N] or None: score = product * mul - sub.
        by_norm: what the rows' norms do to their scores: "none", "cosine" or "l2".
        norms: float32 [N], of the rows; None where the kernel takes them, or none are wanted.
        coded: whether the codes only stand for the rows, and have residuals.
        limits: float32 [3]: the largest residual, size and norm of the rows (``index.quantize``),
            the norm infinite where a row has no bound; None where the kernel takes the norms.
    """

    codes: torch.Tensor
    mul: torch.Tensor | None = None
    sub: torch.Tensor | None = None
    by_norm: str = "none"
    norms: torch.Tensor | None = None
    coded: bool = False
    limits: torch.Tensor | None = None

    @property
    def takes_norms(self) -> bool:
        return self.limits is None


class GroupBest(NamedTuple):
    """What the kernel leaves: int32 [B, groups], packed; float32 [3], see ``Scanned.limits``."""

    first: torch.Tensor
    second: torch.Tensor
    limits: torch.Tensor


def product_unit(codes: torch.Tensor, d: int) -> float:
    """Relative error, to |q| |x|, of the kernel's scores beyond ``_exact.bounds.float32_unit``."""
    split = _SPLIT_UNIT if codes.dtype == torch.float32 else 0.0
    return (d + 32) * _TENSOR_CORE_UNIT + split + PACK_UNIT


def operand_type(codes: torch.Tensor) -> torch.dtype:
    """The type of the queries that the kernel multiplies codes with."""
    return torch.bfloat16 if codes.dtype == torch.int8 else codes.dtype


def scan_rows(rows: torch.Tensor, similarity: str) -> Scanned:
    """What scans the rows [N, d] themselves, whose norms are not known."""
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return Scanned(rows, by_norm="none" if similarity == "dot" else similarity)


def group_best(
    scanned: Scanned,
    operand: torch.Tensor,
    group: int,
    excluded: Exclusions | None = None,
    place: torch.Tensor | None = None,
) -> GroupBest:
    """Packed first and second scores of every group of rows, for each query of ``operand`` [B, d].

    place: int64, the row of each excluded id; None: ids are rows.
    """
    codes = scanned.codes
    batch, count = operand.shape[0], codes.shape[0]
    groups = triton.cdiv(count, group)
    first = torch.empty(batch, groups, dtype=torch.int32, device=codes.device)
    second = torch.empty_like(first)
    config = choose_launch(scanned, operand, group, first, second)
    row_tiles = triton.cdiv(count, config.block_n)
    tile_norms = None
    if scanned.takes_norms:
        tile_norms = torch.empty(row_tiles, dtype=torch.float32, device=codes.device)
    pairs = None
    if excluded is not None:
        pairs = pairs_by_tile(
            excluded,
            batch,
            tile_rows=config.block_n,
            tile_queries=config.block_m,
            row_tiles=row_tiles,
            place=place,
        )
    _launch(scanned, operand, group, first, second, tile_norms, pairs, config)
    limits = scanned.limits
    if limits is None:
        assert tile_norms is not None
        limits = torch.nn.functional.pad(tile_norms.amax(0, keepdim=True), (2, 0))
    return GroupBest(first, second, limits)


def choose_launch(
    scanned: Scanned, operand: torch.Tensor, group: int, first: torch.Tensor, second: torch.Tensor
) -> Launch:
    """The configuration to launch with; measured under ``R2EC_AUTOTUNE=1``."""
    codes = scanned.codes

    def seconds(config: Launch) -> float:
        tiles = triton.cdiv(codes.shape[0], config.block_n)
        norms = torch.empty(tiles, device=codes.device) if scanned.takes_norms else None
        run = partial(_launch, scanned, operand, group, first, second, norms, None, config)
        return triton.testing.do_bench(run)

    return choose(
        operand.shape[0], codes.element_size(), codes.device, seconds, scanned.takes_norms
    )


def _launch(
    scanned: Scanned,
    operand: torch.Tensor,
    group: int,
    first: torch.Tensor,
    second: torch.Tensor,
    tile_norms: torch.Tensor | None,
    pairs: TilePairs | None,
    config: Launch,
) -> None:
    codes, d = scanned.codes, operand.shape[1]
    batch, count = operand.shape[0], codes.shape[0]
    programs = triton.cdiv(count, config.block_n) * triton.cdiv(batch, config.block_m)
    group_best_kernel[(programs,)](
        x_ptr=codes,
        q_ptr=operand,
        mul_ptr=scanned.mul,
        sub_ptr=scanned.sub,
        norm_ptr=scanned.norms,
        tile_norm_ptr=tile_norms,
        pair_ptr=None if pairs is None else pairs.keys,
        pair_start_ptr=None if pairs is None else pairs.start,
        first_ptr=first,
        second_ptr=second,
        num_items=count,
        num_queries=batch,
        d=d,
        stride_x=codes.stride(0),
        stride_q=operand.stride(0),
        **constants(config, group, d, codes.dtype, scanned, pairs is not None),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def constants(
    config: Launch, group: int, d: int, dtype: torch.dtype, scanned: Scanned, pairs: bool
) -> dict[str, object]:
    """The compile-time arguments of the kernel."""
    interpreted = triton.knobs.runtime.interpret
    split = dtype == torch.float32 and not interpreted
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": group,
        "EVEN_K": d % config.block_k == 0,
        "HAS_MUL": scanned.mul is not None,
        "HAS_SUB": scanned.sub is not None,
        "BY_NORM": scanned.by_norm,
        "TAKE_NORM": scanned.takes_norms,
        "HAS_PAIRS": pairs,
        "PRECISION": "bf16x3" if split else "ieee",
        "WIDEN": interpreted,
    }


def group_size(num_rows: int, k: int) -> int:
    """Rows of a group: about sqrt(2 N / k), of the sizes that the kernel has."""
    return GROUPS[num_rows >= 8192 * k]

"""The coarse scan for few queries: the two best scores of every group of rows, in one kernel.

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

import torch
import triton
import triton.language as tl

from ...._scan.triton_exclusions import TilePairs, pair_places
from .factors import distance_bound, inverse_norm, norm_bound
from .groups import LOWEST, Scanned
from .launch import Launch, by_pointers


@triton.jit
def group_best_kernel(
    x_ptr,
    q_ptr,
    mul_ptr,
    sub_ptr,
    norm_ptr,
    along_ptr,
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
    HAS_ALONG: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of items against a tile of queries.

    first, second: int32 [M, ceil(N / GROUP)]. The program's excluded pairs are those numbered
    pair_start[program] .. pair_start[program + 1] - 1. BY_NORM: what a norm does to a score,
    "none", "cosine" or "l2". TAKE_NORM: take the norms here, and write the largest of the tile to
    tile_norm[2, i_n], infinity where one has no bound. HAS_ALONG: c . x - t is part of the score,
    and tile_norm[0, i_n] the largest distance from t c; along: float32 [d + 1] (``direction``).
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
    b_along = tl.zeros([BLOCK_N], dtype=tl.float32)
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
            if HAS_ALONG:
                b_c = tl.load(along_ptr + k + o_k, mask=k + o_k < d, other=0)
                b_along += tl.sum(b_wide * b_c[None, :], axis=1)
    # [BLOCK_N]
    if TAKE_NORM:
        b_norm = tl.sqrt(b_square)
        b_bound = norm_bound(b_norm, m_n, p_x, d, BY_NORM, BLOCK_N, BLOCK_K)
        p_limit = tile_norm_ptr + i_n
        tl.store(p_limit + 2 * tl.cdiv(num_items, BLOCK_N), tl.max(b_bound, axis=0))
    elif BY_NORM != "none":
        b_norm = tl.load(norm_ptr + o_n, mask=m_n, other=0)
    if BY_NORM == "cosine":
        b_mul = inverse_norm(b_norm)
        b_s = b_s * b_mul[:, None]
        b_along = b_along * b_mul
    elif BY_NORM == "l2":
        b_s = b_s - (0.5 * b_norm * b_norm)[:, None]
    if HAS_ALONG:
        middle = tl.load(along_ptr + d)
        if BY_NORM == "cosine":  # of rows at length 1
            b_square = b_square * b_mul * b_mul
        b_far = distance_bound(b_square, b_along, middle, d, m_n)
        tl.store(p_limit, tl.max(b_far, axis=0))
        b_s = b_s + (b_along - middle)[:, None]
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


def run_tiles(
    scanned: Scanned,
    operand: torch.Tensor,
    group: int,
    first: torch.Tensor,
    second: torch.Tensor,
    tile_norms: torch.Tensor | None,
    pairs: TilePairs | None,
    config: Launch,
) -> None:
    """Fill first and second [B, groups], and the tiles' largest norms, for ``operand`` [B, d]."""
    codes, d = scanned.codes, operand.shape[1]
    batch, count = operand.shape[0], codes.shape[0]
    strides = codes.stride(0), operand.stride(0)
    config = by_pointers(config, codes.element_size(), d, *strides)
    programs = triton.cdiv(count, config.block_n) * triton.cdiv(batch, config.block_m)
    group_best_kernel[(programs,)](
        x_ptr=codes,
        q_ptr=operand,
        mul_ptr=scanned.mul,
        sub_ptr=scanned.sub,
        norm_ptr=scanned.norms,
        along_ptr=scanned.direction,
        tile_norm_ptr=tile_norms,
        pair_ptr=None if pairs is None else pairs.keys,
        pair_start_ptr=None if pairs is None else pairs.start,
        first_ptr=first,
        second_ptr=second,
        num_items=count,
        num_queries=batch,
        d=d,
        stride_x=strides[0],
        stride_q=strides[1],
        **_constants(config, group, operand, scanned, pairs is not None),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _constants(
    config: Launch, group: int, operand: torch.Tensor, scanned: Scanned, pairs: bool
) -> dict[str, object]:
    """The compile-time arguments of the kernel."""
    interpreted = triton.knobs.runtime.interpret
    codes, d = scanned.codes, operand.shape[1]
    split = codes.dtype == torch.float32 and not interpreted
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
        "HAS_ALONG": scanned.direction is not None,
        "HAS_PAIRS": pairs,
        "PRECISION": "bf16x3" if split else "ieee",
        "WIDEN": interpreted,
    }

"""The coarse scan for many queries: group maxima that stay in the registers of a thread.

For queries Q [M, d] (M = B) and the rows X [N, d] of a copy of the table it computes

    s[m, n] = mul[n] (q_m . x_n) - sub[n],          -inf for excluded pairs,

and leaves what ``groups`` describes: the two best s of every query and group. The product is
written queries x items, so that a thread holds 2 of every 8 columns of a row of it, and those are a
group (or, of groups of 128 rows, a quarter of one). A score costs about five instructions: one puts
its place into its lowest bits, three keep the two best so far, by maxima and minima of the floats
themselves; the order of the packed integers is made of the few results. Nothing of size [M, N] is
stored.

Grid: programs that stay, as many as the multiprocessors hold; each takes tile after tile, queries
fastest: programs that run together share a tile of items, which memory delivers once.
Tile: [BLOCK_M, BLOCK_N] scores in steps of BLOCK_K columns. Operands come by the tensor memory
accelerator (TMA) where the card has it and rows lie 16-byte aligned, else by pointers.
Reads N d + M d elements from memory (the items again from cache for every tile of queries) and up
to 8 bytes a row for mul and sub; writes 8 M N / GROUP bytes. FLOPs: 2 M N d.
Numerics: accumulated in float32 (float32 operands as three bfloat16 products); ``product_unit``
bounds the error. With a place in its lowest bits 0 is a subnormal number, which nothing flushes.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ...._scan.triton_exclusions import TilePairs, pair_places
from .factors import Factors
from .groups import LOWEST
from .launch import Launch, by_pointers, multiprocessors

# Of a thread, by target and bytes of a number, for tiles by TMA: on sm_90 two programs share a
# multiprocessor; on sm_100 the compiler would take fewer than it needs.
MOST_REGISTERS = {"sm_90": {1: 128, 2: 128}, "sm_100": {2: 224}}


@triton.jit
def _ordered(packed, low, GROUP: tl.constexpr):
    """Floats as the integers of ``groups``; ``low`` are bits of the place still missing."""
    bits = packed.to(tl.int32, bitcast=True) | low
    # all but the place takes the order of the floats
    bits = bits ^ ((bits >> 31) & (0x80000000 - GROUP))
    return tl.where(packed == -float("inf"), LOWEST, bits)


@triton.jit
def store_best(
    b_s,
    i_m,
    i_n,
    tile,
    keep,
    pair_ptr,
    pair_start_ptr,
    first_ptr,
    second_ptr,
    num_items,
    num_queries,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_OFF: tl.constexpr,
):
    """The two best of every group of a tile of scores [BLOCK_M, BLOCK_N], as packed integers.

    tile: the number under which ``TilePairs`` has its excluded pairs. keep: -GROUP, in a register
    and no constant: then the place is put in by one instruction. LEVELS: log2(BLOCK_N / 8).
    HAS_OFF: some rows are switched off, with scores of -inf.
    """
    SHARE: tl.constexpr = BLOCK_N // GROUP  # groups of a row of the tile
    WIDTH: tl.constexpr = 8 // SHARE
    # Column 8 j + 2 h + e of the tile: [BLOCK_M, j, h, e]. Its place but for h: [1, j, 1, e].
    b_s = tl.reshape(b_s, [BLOCK_M, BLOCK_N // 8, 4, 2])
    o_j = tl.arange(0, BLOCK_N // 8)[None, :, None, None]
    o_h = tl.arange(0, 4)[None, None, :, None]
    o_place = o_j * WIDTH + tl.arange(0, 2)[None, None, None, :]
    b_i = (b_s.to(tl.int32, bitcast=True) & keep) | o_place
    if HAS_OFF:
        # -inf with a place is a NaN, above all other negative floats as an unsigned integer
        b_i = tl.minimum(b_i.to(tl.uint32, bitcast=True), 0xFF800000)
    # from here on -inf is no row
    b_s = b_i.to(tl.float32, bitcast=True)
    left = num_items - i_n * BLOCK_N
    if left < BLOCK_N:
        b_left = left // 8 * WIDTH + tl.minimum(tl.maximum(left % 8 - o_h * 2, 0), 2)
        b_s = tl.where(o_place < b_left, b_s, -float("inf"))
    if HAS_PAIRS:
        o_in = tl.arange(0, BLOCK_M)[:, None, None, None]
        first_pair, last_pair = tl.load(pair_start_ptr + tile), tl.load(pair_start_ptr + tile + 1)
        for i_pair in range(first_pair, last_pair):
            row, of = pair_places(tl.load(pair_ptr + i_pair))
            m_here = (o_in == of) & (o_h == row % 8 // 2)
            b_place = tl.where(m_here, row // 8 * WIDTH + row % 2, -1)
            b_s = tl.where(o_place == b_place, -float("inf"), b_s)
    b_even, b_odd = tl.split(b_s)
    b_first, b_second = tl.maximum(b_even, b_odd), tl.minimum(b_even, b_odd)
    for _ in tl.static_range(LEVELS):
        # [BLOCK_M, j, 4], half as many j each time
        b_first = tl.reshape(b_first, [BLOCK_M, b_first.shape[1] // 2, 2, 4])
        b_second = tl.reshape(b_second, [BLOCK_M, b_second.shape[1] // 2, 2, 4])
        b_one, b_other = tl.split(tl.permute(b_first, (0, 1, 3, 2)))
        b_three, b_four = tl.split(tl.permute(b_second, (0, 1, 3, 2)))
        b_first = tl.maximum(b_one, b_other)
        b_second = tl.maximum(tl.minimum(b_one, b_other), tl.maximum(b_three, b_four))
    # [BLOCK_M, SHARE, columns h of a group]
    o_low = (tl.arange(0, 4) % (4 // SHARE) * 2)[None, :]
    b_first = tl.reshape(b_first, [BLOCK_M, 4])
    b_second = tl.reshape(b_second, [BLOCK_M, 4])
    b_first = tl.reshape(_ordered(b_first, o_low, GROUP), [BLOCK_M, SHARE, 4 // SHARE])
    b_second = tl.reshape(_ordered(b_second, o_low, GROUP), [BLOCK_M, SHARE, 4 // SHARE])
    b_best = tl.max(b_first, axis=2)
    b_second = tl.max(tl.where(b_first == b_best[:, :, None], b_second, b_first), axis=2)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_g = i_n * SHARE + tl.arange(0, SHARE)
    num_groups = tl.cdiv(num_items, BLOCK_N) * SHARE
    o_out = o_m.to(tl.int64)[:, None] * num_groups + o_g[None, :]
    m_out = (o_m < num_queries)[:, None]
    tl.store(first_ptr + o_out, b_best, mask=m_out)
    tl.store(second_ptr + o_out, b_second, mask=m_out)


@triton.jit
def wide_kernel(
    x,
    q,
    mul_ptr,
    sub_ptr,
    pair_ptr,
    pair_start_ptr,
    first_ptr,
    second_ptr,
    num_items,
    num_queries,
    d,
    stride_x,
    stride_q,
    keep,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_MUL: tl.constexpr,
    HAS_SUB: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_OFF: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Tiles of queries against tiles of items.

    x, q: descriptors (TMA) or pointers of the items and the queries. mul, sub: float32, up to the
    end of the last tile. first, second: int32 [M, groups].
    """
    query_tiles = tl.cdiv(num_queries, BLOCK_M)
    num_tiles = query_tiles * tl.cdiv(num_items, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        i_m, i_n = tile % query_tiles, tile // query_tiles
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        b_s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if not TMA:
            o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
            o_k = tl.arange(0, BLOCK_K)
            m_m, m_n = o_m < num_queries, o_n < num_items
            p_q = q + o_m.to(tl.int64)[:, None] * stride_q + o_k[None, :]
            p_x = x + o_n.to(tl.int64)[None, :] * stride_x + o_k[:, None]
        for k in range(0, d, BLOCK_K):
            # [BLOCK_M, BLOCK_K] queries, [BLOCK_K, BLOCK_N] items; zeros outside
            if TMA:
                b_q = q.load([i_m * BLOCK_M, k])
                b_x = x.load([i_n * BLOCK_N, k]).T
            elif EVEN_K:
                b_q = tl.load(p_q + k, mask=m_m[:, None], other=0)
                b_x = tl.load(p_x + k, mask=m_n[None, :], other=0)
            else:
                m_k = k + o_k < d
                b_q = tl.load(p_q + k, mask=m_m[:, None] & m_k[None, :], other=0)
                b_x = tl.load(p_x + k, mask=m_n[None, :] & m_k[:, None], other=0)
            if WIDEN:
                b_x, b_q = b_x.to(tl.float32), b_q.to(tl.float32)
            else:
                b_x = b_x.to(b_q.dtype)
            b_s = tl.dot(b_q, b_x, b_s, input_precision=PRECISION)
        if HAS_MUL:
            b_s = b_s * tl.load(mul_ptr + o_n)[None, :]
        if HAS_SUB:
            b_s = b_s - tl.load(sub_ptr + o_n)[None, :]
        store_best(
            b_s,
            i_m,
            i_n,
            tile,
            keep,
            pair_ptr,
            pair_start_ptr,
            first_ptr,
            second_ptr,
            num_items,
            num_queries,
            BLOCK_M,
            BLOCK_N,
            LEVELS,
            GROUP,
            HAS_PAIRS,
            HAS_OFF,
        )


def run_wide(
    codes: torch.Tensor,
    operand: torch.Tensor,
    group: int,
    first: torch.Tensor,
    second: torch.Tensor,
    factors: Factors,
    pairs: TilePairs | None,
    config: Launch,
) -> None:
    """Fill first and second [B, groups] for ``operand`` [B, d]; spans are the tiles' width."""
    (count, _), (batch, d) = codes.shape, operand.shape
    interpreted = triton.knobs.runtime.interpret
    strides = codes.stride(0), operand.stride(0)
    tma = _takes_tma(codes) and _takes_tma(operand)
    if not tma:
        config = by_pointers(config, codes.element_size(), d, *strides)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    x: Any = codes
    q: Any = operand
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x = TensorDescriptor(codes, [count, d], [strides[0], 1], [block_n, block_k])
        q = TensorDescriptor(operand, [batch, d], [strides[1], 1], [block_m, block_k])
    options = _most_registers(codes) if tma else {}
    tiles = triton.cdiv(count, block_n) * triton.cdiv(batch, block_m)
    programs = min(tiles, 2 * multiprocessors(codes.device))
    wide_kernel[(programs,)](
        x=x,
        q=q,
        mul_ptr=factors.mul,
        sub_ptr=factors.sub,
        pair_ptr=None if pairs is None else pairs.keys,
        pair_start_ptr=None if pairs is None else pairs.start,
        first_ptr=first,
        second_ptr=second,
        num_items=count,
        num_queries=batch,
        d=d,
        stride_x=strides[0],
        stride_q=strides[1],
        keep=-group,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        LEVELS=levels(block_n),
        GROUP=group,
        TMA=tma,
        EVEN_K=d % block_k == 0,
        HAS_MUL=factors.mul is not None,
        HAS_SUB=factors.sub is not None,
        HAS_PAIRS=pairs is not None,
        HAS_OFF=factors.some_off,
        PRECISION="bf16x3" if codes.dtype == torch.float32 and not interpreted else "ieee",
        WIDEN=interpreted,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )


def levels(block_n: int) -> int:
    """Halvings from a tile's columns of eight to one."""
    return (block_n // 8).bit_length() - 1


def _most_registers(codes: torch.Tensor) -> dict[str, int]:
    """The compiler's option for ``MOST_REGISTERS``."""
    if codes.device.type == "cpu":
        return {}
    target = "sm_{}{}".format(*torch.cuda.get_device_capability(codes.device))
    limit = MOST_REGISTERS.get(target, {}).get(codes.element_size())
    return {} if limit is None else {"maxnreg": limit}


def _takes_tma(rows: torch.Tensor) -> bool:
    """Whether the device's TMA can load tiles of these rows; Triton's interpreter does the same."""
    if not triton.knobs.runtime.interpret and (
        torch.version.hip or torch.cuda.get_device_capability(rows.device)[0] < 9
    ):
        return False
    return rows.data_ptr() % 16 == 0 and rows.stride(0) * rows.element_size() % 16 == 0

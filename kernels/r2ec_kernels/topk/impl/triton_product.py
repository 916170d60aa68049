"""The coarse scan for many queries by the library's matrix product, a part of the table at a time.

The product of all queries and some rows goes to a buffer that stays in the card's second-level
cache, and a kernel leaves the two best scores of every group of it (``triton_groups``): what
``triton_wide`` does in one kernel. It is for cards and widths where the library's product is so
much faster that the way through the cache pays; ``launch`` measures which.

Grid: tiles of the buffer, queries fastest. Tile: [BLOCK_M, BLOCK_N] scores. Reads 4 bytes a score
from cache, where the product left them, and up to 8 bytes a row; writes 8 M N / GROUP bytes.
Memory: the buffer, 32 MiB or a tile's width of all queries. Numerics: products of 16-bit numbers
accumulated in float32; ``product_unit`` bounds the error.
"""

import torch
import triton
import triton.language as tl

from ..._scan.triton_exclusions import TilePairs
from .launch import Launch
from .triton_factors import Factors
from .triton_wide import levels, store_best

_BUFFER = 1 << 25  # bytes: below the second-level cache of every target but the smallest


@triton.jit
def group_max_kernel(
    z_ptr,
    mul_ptr,
    sub_ptr,
    pair_ptr,
    pair_start_ptr,
    first_ptr,
    second_ptr,
    first_row_tile,
    num_items,
    num_queries,
    stride_z,
    keep,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MUL: tl.constexpr,
    HAS_SUB: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_OFF: tl.constexpr,
):
    """A tile of products z [M, whole tiles of rows], whose first row begins tile first_row_tile.

    Behind the last row z may hold anything.
    """
    query_tiles = tl.cdiv(num_queries, BLOCK_M)
    i_m = tl.program_id(0) % query_tiles
    i_z = tl.program_id(0) // query_tiles
    i_n = first_row_tile + i_z
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_z = i_z * BLOCK_N + tl.arange(0, BLOCK_N)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_z = z_ptr + o_m.to(tl.int64)[:, None] * stride_z + o_z[None, :]
    b_s = tl.load(p_z, mask=(o_m < num_queries)[:, None], other=0)
    if HAS_MUL:
        b_s = b_s * tl.load(mul_ptr + o_n)[None, :]
    if HAS_SUB:
        b_s = b_s - tl.load(sub_ptr + o_n)[None, :]
    store_best(
        b_s,
        i_m,
        i_n,
        i_n * query_tiles + i_m,
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


def run_product(
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
    row_tiles = triton.cdiv(count, config.block_n)
    held = min(row_tiles, max(1, _BUFFER // (4 * batch * config.block_n)))
    buffer = torch.empty(batch * held * config.block_n, dtype=torch.float32, device=codes.device)
    for tile in range(0, row_tiles, held):
        part = codes[tile * config.block_n : (tile + held) * config.block_n, :d]
        rows = part.shape[0]
        width = triton.cdiv(rows, config.block_n) * config.block_n
        z = buffer[: batch * width].view(batch, width)
        _multiply(operand, part, z[:, :rows])
        tiles = width // config.block_n * triton.cdiv(batch, config.block_m)
        group_max_kernel[(tiles,)](
            z_ptr=z,
            mul_ptr=factors.mul,
            sub_ptr=factors.sub,
            pair_ptr=None if pairs is None else pairs.keys,
            pair_start_ptr=None if pairs is None else pairs.start,
            first_ptr=first,
            second_ptr=second,
            first_row_tile=tile,
            num_items=count,
            num_queries=batch,
            stride_z=width,
            keep=-group,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            LEVELS=levels(config.block_n),
            GROUP=group,
            HAS_MUL=factors.mul is not None,
            HAS_SUB=factors.sub is not None,
            HAS_PAIRS=pairs is not None,
            HAS_OFF=factors.some_off,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _multiply(operand: torch.Tensor, rows: torch.Tensor, z: torch.Tensor) -> None:
    """z = operand rows^T in float32."""
    if operand.device.type == "cpu":  # which has no product of 16-bit numbers into float32
        torch.mm(operand.float(), rows.float().T, out=z)
    else:
        torch.mm(operand, rows.to(operand.dtype).T, out_dtype=torch.float32, out=z)

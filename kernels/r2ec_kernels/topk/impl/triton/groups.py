"""Groups of rows, and what a scan keeps of each: its two best scores and where the best is.

A score is packed with its row's place in the group into an int32: bits in the order of the floats,
of which the lowest log2(GROUP) give way to the place. ``unpack`` is the score rounded down.

Which rows make a group is the scan's choice, so that its reductions are cheap. A span is SPAN
consecutive rows. It holds SPAN / GROUP = 1, 2 or 4 groups, and each has the same
WIDTH = 8 GROUP / SPAN rows of every eight. A span of one group is GROUP consecutive rows. With four
groups a span, WIDTH is 2: the columns of a product that one thread of a tensor core holds.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

GROUPS = (32, 128)  # rows of a group
LOWEST = tl.constexpr(-(2**31))  # packed: no row
PACK_UNIT = 2.0**-15  # of a packed score, relative: the place takes at most 7 bits of 24
_TENSOR_CORE_UNIT = 2.0**-22  # a term of a tensor-core sum, which may be truncated, not rounded
_SPLIT_UNIT = 2.0**-15  # float32 operands as sums of two bfloat16


@triton.jit
def unpack(packed, GROUP: tl.constexpr):
    """Scores of packed values, rounded down to the bits that are left; -inf for no row, and NaN
    for one that is switched off (its score is -inf, and NaN is below it)."""
    bits = packed & -GROUP
    score = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    return tl.where(packed == LOWEST, -float("inf"), score)


@triton.jit
def row_of(group, place, GROUP: tl.constexpr, SPAN: tl.constexpr):
    """The row at a place of a group; it may lie behind the last one."""
    SHARE: tl.constexpr = SPAN // GROUP
    WIDTH: tl.constexpr = 8 // SHARE
    # group // SHARE * SPAN + group % SHARE * WIDTH + place // WIDTH * 8 + place % WIDTH
    begin = (group & -SHARE) * GROUP + (group & (SHARE - 1)) * WIDTH
    return begin + (place & -WIDTH) * SHARE + (place & (WIDTH - 1))


def num_groups(num_rows: int, group: int, span: int) -> int:
    """Groups of a table: whole spans where they share rows."""
    return triton.cdiv(num_rows, span) * (span // group)


@dataclass(frozen=True)
class Scanned:
    """What a scan multiplies, and what its scores may be off by.

    Attributes:
        codes: [N, >= d], float32, bfloat16, float16 or int8: the rows, or what stands for them.
        mul, sub: float32 [N] or None: score = product * mul - sub.
        by_norm: what the rows' norms do to their scores: "none", "cosine" or "l2".
        norms: float32 [N], of the rows; None where the scan takes them, or none are wanted.
        coded: whether the codes only stand for the rows, and have residuals.
        limits: float32 [3]: the largest residual, size and norm of the rows (``index.quantize``),
            the norm infinite where a row has no bound; None where the scan takes the norms. With a
            direction the first is the largest distance from t c.
        some_off: whether some rows are switched off, by an infinite ``sub``.
        direction: float32 [d + 1], taken off the queries and given back by the scan where it takes
            the norms (``direction``); None for none.
    """

    codes: torch.Tensor
    mul: torch.Tensor | None = None
    sub: torch.Tensor | None = None
    by_norm: str = "none"
    norms: torch.Tensor | None = None
    coded: bool = False
    limits: torch.Tensor | None = None
    some_off: bool = False
    direction: torch.Tensor | None = None

    @property
    def takes_norms(self) -> bool:
        return self.limits is None


class GroupBest(NamedTuple):
    """What a scan leaves.

    first, second: int32 [B, groups], packed. limits: float32 [3], see ``Scanned.limits``. span:
    rows that share their groups (``row_of``).
    """

    first: torch.Tensor
    second: torch.Tensor
    limits: torch.Tensor
    span: int


def product_unit(codes: torch.Tensor, d: int) -> float:
    """Relative error, to |q| |x|, of a scan's scores beyond ``_exact.bounds.float32_unit``."""
    split = _SPLIT_UNIT if codes.dtype == torch.float32 else 0.0
    return (d + 32) * _TENSOR_CORE_UNIT + split + PACK_UNIT


def operand_type(codes: torch.Tensor) -> torch.dtype:
    """The type of the queries that a scan multiplies codes with."""
    return torch.bfloat16 if codes.dtype == torch.int8 else codes.dtype


def scan_rows(rows: torch.Tensor, similarity: str) -> Scanned:
    """What scans the rows [N, d] themselves, whose norms are not known."""
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return Scanned(rows, by_norm="none" if similarity == "dot" else similarity)


def group_size(num_rows: int, k: int) -> int:
    """Rows of a group: about sqrt(2 N / k), of the sizes that the scan has."""
    return GROUPS[num_rows >= 8192 * k]

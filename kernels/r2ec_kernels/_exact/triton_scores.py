"""Canonical scores inside Triton kernels: the same bits as ``scores`` on any device.

The canonical sum of d terms adds the upper half to the lower half until one is left (``scores``). A
tensor of a kernel has a power of two of columns, so the terms are loaded to the places where plain
halving of that many columns adds the same pairs, and zeros where the middle one of an odd width
waits (``halving_places``). Products of float32, bfloat16 and float16 numbers are exact in float64;
squared differences are not, so kernels that take "l2" are launched with ``enable_fp_fusion=False``.

Registers: a float64 for every column of a tile, over the threads of a program.
"""

import struct

import triton
import triton.language as tl

from .._checks import MAX_ITEMS

PADDING = tl.constexpr(-(2**63))  # ``scores.PADDING_KEY``
_LAST_ID = tl.constexpr(MAX_ITEMS)


def float64_bits(value: float) -> int:
    """A float64 as the int64 that a kernel takes: its arguments have no float64."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@triton.jit
def float64_of(bits):
    """The float64 of an argument by ``float64_bits``."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def halving_places(d, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """For the places 0 .. WIDTH - 1 of a tile: which of d columns each holds, and whether any.

    WIDTH = 2^LEVELS is the least power of two that is at least d. Bit ``LEVELS - l`` of a place
    says which half it is in at the l-th halving, which leaves ceil(d / 2^l) columns.
    """
    o_w = tl.arange(0, WIDTH)
    column = tl.zeros([WIDTH], tl.int32)
    m_w = column == 0
    for bit in tl.static_range(LEVELS):
        # columns after the halving that this bit tells apart, and before it
        after = (d + ((1 << (LEVELS - bit)) - 1)) >> (LEVELS - bit)
        before = (d + ((1 << (LEVELS - bit - 1)) - 1)) >> (LEVELS - bit - 1)
        column += ((o_w >> bit) & 1) * after
        m_w = m_w & (column < before)
    return column, m_w


@triton.jit
def halving_sum(terms, ROWS: tl.constexpr, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """The canonical sums [ROWS] of float64 terms [ROWS, WIDTH] at their places."""
    for level in tl.static_range(LEVELS):
        terms = tl.sum(tl.reshape(terms, [ROWS, 2, WIDTH >> (level + 1)]), axis=1)
    return tl.reshape(terms, [ROWS])


@triton.jit
def canonical_scores(
    b_q,
    b_x,
    temperature,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SIMILARITY: tl.constexpr,
):
    """Canonical scores float32 [ROWS] of a query and rows at their places.

    b_q: float64 [1, WIDTH]; b_x: float64 [ROWS, WIDTH]; temperature: float64.
    """
    if SIMILARITY == "l2":
        difference = b_q - b_x
        value = -tl.sqrt(halving_sum(difference * difference, ROWS, WIDTH, LEVELS))
    else:
        value = halving_sum(b_q * b_x, ROWS, WIDTH, LEVELS)
        if SIMILARITY == "cosine":
            length = tl.sqrt(halving_sum(b_q * b_q, 1, WIDTH, LEVELS))
            scale = length * tl.sqrt(halving_sum(b_x * b_x, ROWS, WIDTH, LEVELS))
            zero = scale == 0
            value = tl.where(zero, 0.0, value / tl.where(zero, 1.0, scale))
    score = (value / temperature).to(tl.float32)
    return tl.where(score == 0, 0.0, score)  # -0.0 becomes 0.0


@triton.jit
def order_keys(score, ids):
    """``scores.order_keys`` of float32 scores and int64 ids."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return tl.where(score == score, (bits << 32) + (_LAST_ID - ids), PADDING)


@triton.jit
def scores_and_ids(keys):
    """``scores.from_order_keys``: float32 scores and int64 ids; (-inf, -1) for ``PADDING``."""
    bits = (keys >> 32).to(tl.int32)
    scores = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    ids = _LAST_ID - (keys & 0xFFFFFFFF)
    empty = keys == PADDING
    return tl.where(empty, -float("inf"), scores), tl.where(empty, -1, ids)

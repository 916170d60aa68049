"""The exact search of a query whose list overflowed: all rows of the groups that reach its cut.

The best order keys so far lie in the room of the list. When it is full, the k-th largest is found
bit by bit and all below it go: O(k) memory, and no sort of more than fits. One program a query:
slow beside a scan, and rare. Reads d elements of every row of the groups that reach the cut, writes
8 bytes for each key above the k-th best so far.
"""

import triton
import triton.language as tl

from ..._exact.triton_scores import PADDING, float64_of, halving_places
from .triton_groups import row_of, unpack
from .triton_rows import row_keys


@triton.jit
def _kth_key(keys_ptr, fill, k, BLOCK_C: tl.constexpr):
    """The k-th largest of ``fill`` >= k distinct order keys, bit by bit."""
    found = tl.full([], -(2**63), tl.int64)
    for i_bit in range(64):
        # the sign first: 0 is the least key without it
        trial = tl.where(i_bit == 0, 0, found | (tl.full([], 1, tl.int64) << (63 - i_bit)))
        count = 0
        for start in range(0, fill, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            b_keys = tl.load(keys_ptr + o_c, mask=o_c < fill, other=-(2**63))
            count += tl.sum(((b_keys >= trial) & (o_c < fill)).to(tl.int32), axis=0)
        found = tl.where(count >= k, trial, found)
    return found


@triton.jit
def _keep_from(keys_ptr, fill, least, BLOCK_C: tl.constexpr):
    """Move the keys that are at least ``least`` to the front; returns how many there are."""
    kept = 0
    for start in range(0, fill, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_keys = tl.load(keys_ptr + o_c, mask=o_c < fill, other=-(2**63))
        m_keep = (b_keys >= least) & (o_c < fill)
        o_out = kept + tl.cumsum(m_keep.to(tl.int32), 0) - 1
        tl.debug_barrier()  # all of the block is read before any of it is overwritten
        tl.store(keys_ptr + o_out, b_keys, mask=m_keep)
        kept += tl.sum(m_keep.to(tl.int32), axis=0)
        tl.debug_barrier()
    return kept


@triton.jit
def search_all_kernel(
    q_ptr,
    x_ptr,
    ids_ptr,
    exclude_ptr,
    exclude_start_ptr,
    allowed_ptr,
    first_ptr,
    count_ptr,
    cut_ptr,
    keys_ptr,
    num_items,
    num_groups,
    d,
    stride_q,
    stride_x,
    capacity,
    k,
    temperature,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SIMILARITY: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One query, where its list overflowed: all rows of the groups that reach its cut.

    keys [M, capacity] collects the order keys above the k-th best so far; when it is full, all but
    the k best go.
    """
    i_m = tl.program_id(0).to(tl.int64)
    num_single = tl.load(count_ptr + 2 * i_m)
    total = num_single + tl.load(count_ptr + 2 * i_m + 1) * GROUP
    temperature = float64_of(temperature)
    if (num_single > capacity) | (total > capacity):
        o_d, m_d = halving_places(d, WIDTH, LEVELS)
        b_q = tl.load(q_ptr + i_m * stride_q + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_q = tl.reshape(b_q.to(tl.float64), [1, WIDTH])
        cut = tl.load(cut_ptr + i_m)
        p_keys = keys_ptr + i_m * capacity
        least = tl.full([], -(2**63), tl.int64)
        fill = 0
        for i_g in range(0, num_groups):
            best = unpack(tl.load(first_ptr + i_m * num_groups + i_g), GROUP)
            if (cut == -float("inf")) | (best >= cut):
                for start in range(0, GROUP, ROWS):
                    b_row = row_of(i_g, start + tl.arange(0, ROWS), GROUP, SPAN)
                    b_keys, _ = row_keys(
                        i_m,
                        b_row,
                        b_row < num_items,
                        b_q,
                        o_d,
                        m_d,
                        x_ptr,
                        ids_ptr,
                        exclude_ptr,
                        exclude_start_ptr,
                        allowed_ptr,
                        stride_x,
                        temperature,
                        ROWS,
                        WIDTH,
                        LEVELS,
                        SIMILARITY,
                        HAS_IDS,
                        HAS_EXCLUDE,
                        HAS_ALLOWED,
                        BLOCK_E,
                    )
                    num_better = tl.sum((b_keys > least).to(tl.int32), axis=0)
                    if fill + num_better > capacity:
                        tl.debug_barrier()  # what the program stored is there
                        least = _kth_key(p_keys, fill, k, BLOCK_C)
                        fill = _keep_from(p_keys, fill, least, BLOCK_C)
                    m_better = b_keys > least
                    o_out = fill + tl.cumsum(m_better.to(tl.int32), 0) - 1
                    tl.store(p_keys + o_out, b_keys, mask=m_better)
                    fill += tl.sum(m_better.to(tl.int32), axis=0)
        for start in range(0, capacity, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            b_none = tl.full([BLOCK_C], PADDING, tl.int64)
            tl.store(p_keys + o_c, b_none, mask=(o_c >= fill) & (o_c < capacity))

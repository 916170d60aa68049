"""Order keys of some rows for one query: what every kernel does that ends a search exactly."""

import triton
import triton.language as tl

from ..._exact.triton_scores import PADDING, canonical_scores, order_keys
from ..._scan.triton_exclusions import excluded_ids


@triton.jit
def row_keys(
    i_m,
    b_row,
    m_row,
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
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    SIMILARITY: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Order keys int64 [ROWS] of a query's rows; PADDING where masked, excluded or not allowed.
    Also whether some score that counts is infinite: those are ties that the bounds do not see."""
    b_id = b_row.to(tl.int64)
    if HAS_IDS:
        b_id = tl.load(ids_ptr + b_id, mask=m_row, other=0)
    if HAS_ALLOWED:
        m_row = m_row & (tl.load(allowed_ptr + b_row, mask=m_row, other=0) != 0)
    if HAS_EXCLUDE:
        m_row = m_row & ~excluded_ids(b_id, i_m, exclude_ptr, exclude_start_ptr, BLOCK_E)
    p_x = x_ptr + b_row.to(tl.int64)[:, None] * stride_x + o_d[None, :]
    b_x = tl.load(p_x, mask=m_row[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    score = canonical_scores(b_q, b_x.to(tl.float64), temperature, ROWS, WIDTH, LEVELS, SIMILARITY)
    keys = tl.where(m_row, order_keys(score, b_id), PADDING)
    infinite = m_row & (tl.abs(score) == float("inf"))
    return keys, tl.sum(infinite.to(tl.int32), axis=0) > 0

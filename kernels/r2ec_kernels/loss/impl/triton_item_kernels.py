"""The device code of the item action: a softmax over the batch's candidates, and its gradient.

With s_rm = u_r . v_m the products of a matrix library, for trajectory r and candidate m

    x_rm = s_rm / (|u_r| |v_m| t)  (cosine)  or  s_rm / t  (dot),     log p_r = x[target] - lse_r
    q_rm = d log p_r / d s_rm = (1[m = target] - p_rm) x_rm / s_rm

so that with the incoming gradient g the library makes y_r = sum_m g_r q_rm v_m in backward, and
likewise for the items. ``softmax_kernel`` makes log p and q. Grid: one program a trajectory. Tile:
[BLOCK_M]. Reads 4 d + 8 M bytes twice, writes 4 M.

``project_kernel`` takes from y_r what is parallel to u_r, along which a cosine does not change.
Grid: one program a row. Tile: [BLOCK_D]. Reads 16 d bytes, writes up to 4 d.

Candidates are all rows but the others with the target's id. FLOPs: about ten a product and column.
Numerics: float32; the norm of a zero row is 1, as if it had none.
"""

import triton
import triton.language as tl


@triton.jit
def _square(p_row, d, BLOCK_D: tl.constexpr):
    """Squared norm of a contiguous row."""
    b_square = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, d, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        # [BLOCK_D]
        b_row = tl.load(p_row + o_d, mask=o_d < d, other=0.0)
        b_square += b_row * b_row
    return tl.sum(b_square, axis=0)


@triton.jit
def softmax_kernel(
    dot_ptr,
    user_ptr,
    norm_ptr,
    item_id_ptr,
    item_target_ptr,
    log_prob_ptr,
    slope_ptr,
    group,
    num_items,
    d,
    inverse_temperature,
    COSINE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One trajectory: log-probability of its target, and q of its products.

    dot, slope: [R, M]. user: [R, d]. norm: [M], of the items.
    """
    i_r = tl.program_id(0).to(tl.int64)
    target = tl.load(item_target_ptr + i_r // group)
    target_id = tl.load(item_id_ptr + target)
    scale = inverse_temperature
    if COSINE:
        square = _square(user_ptr + i_r * d, d, BLOCK_D)
        scale = inverse_temperature / tl.where(square > 0, tl.sqrt(square), 1.0)
    m = -float("inf")
    l = 0.0
    picked = 0.0
    for start in range(0, num_items, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        b_scale, m_m = _candidates(o_m, num_items, target, target_id, item_id_ptr, norm_ptr, COSINE)
        # [BLOCK_M]
        b_x = tl.load(dot_ptr + i_r * num_items + o_m, mask=m_m, other=0.0) * (b_scale * scale)
        picked += tl.sum(tl.where(m_m & (o_m == target), b_x, 0.0), axis=0)
        above = tl.maximum(m, tl.max(tl.where(m_m, b_x, -float("inf")), axis=0))
        lowest = tl.maximum(above, -3.4e38)  # where there was no candidate yet
        l = l * tl.exp(m - lowest) + tl.sum(tl.where(m_m, tl.exp(b_x - lowest), 0.0), axis=0)
        m = above
    lse = m + tl.log(l)
    tl.store(log_prob_ptr + i_r, picked - lse)
    for start in range(0, num_items, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        b_scale, m_m = _candidates(o_m, num_items, target, target_id, item_id_ptr, norm_ptr, COSINE)
        b_scale *= scale
        # [BLOCK_M]
        b_x = tl.load(dot_ptr + i_r * num_items + o_m, mask=m_m, other=0.0) * b_scale
        b_slope = tl.where(o_m == target, 1.0, 0.0) - tl.exp(b_x - lse)
        b_slope = tl.where(m_m, b_slope * b_scale, 0.0)
        tl.store(slope_ptr + i_r * num_items + o_m, b_slope, mask=o_m < num_items)


@triton.jit
def _candidates(o_m, num_items, target, target_id, item_id_ptr, norm_ptr, COSINE: tl.constexpr):
    """The inverse norms of a block of items, and which of them are candidates."""
    m_m = o_m < num_items
    # [BLOCK_M]
    b_id = tl.load(item_id_ptr + o_m, mask=m_m, other=0)
    b_scale = tl.full(o_m.shape, 1.0, tl.float32)
    if COSINE:
        b_norm = tl.load(norm_ptr + o_m, mask=m_m, other=1.0)
        b_scale = 1.0 / tl.where(b_norm > 0, b_norm, 1.0)
    return b_scale, m_m & ((b_id != target_id) | (o_m == target))


@triton.jit
def project_kernel(
    grad_ptr,
    row_ptr,
    out_ptr,
    d,
    BLOCK_D: tl.constexpr,
):
    """One row: y - (y . u) u / |u|^2, or y where u is 0. All are [N, d], contiguous."""
    i_n = tl.program_id(0).to(tl.int64)
    p_grad, p_row = grad_ptr + i_n * d, row_ptr + i_n * d
    b_dot = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, d, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        # [BLOCK_D]
        b_grad = tl.load(p_grad + o_d, mask=o_d < d, other=0.0)
        b_dot += b_grad * tl.load(p_row + o_d, mask=o_d < d, other=0.0)
    square = _square(p_row, d, BLOCK_D)
    share = tl.sum(b_dot, axis=0) / tl.where(square > 0, square, 1.0)
    for first in range(0, d, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        # [BLOCK_D]
        b_grad = tl.load(p_grad + o_d, mask=o_d < d, other=0.0)
        b_grad -= share * tl.load(p_row + o_d, mask=o_d < d, other=0.0)
        tl.store(out_ptr + i_n * d + o_d, b_grad.to(out_ptr.dtype.element_ty), mask=o_d < d)

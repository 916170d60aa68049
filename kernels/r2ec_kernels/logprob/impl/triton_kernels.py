"""The device code of the language-model head. Logits are in units of log 2."""

import triton
import triton.language as tl

from ..._numbers import LOG2_E

TWO_LOG2_E = tl.constexpr(2 * LOG2_E)


@triton.jit
def _row(p_z, p_bias, o_v, m_v, HAS_BIAS: tl.constexpr):
    """One row's products of a block, with the bias."""
    z = tl.load(p_z + o_v, mask=m_v, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)
    return z


@triton.jit
def _transform(z, inner, outer, SOFTCAP: tl.constexpr):
    """Products to logits in units of log 2, and the slope of the soft-cap."""
    x = z * inner
    derivative = 1.0
    if SOFTCAP:
        tanh = 1.0 - 2.0 / (tl.exp2(x * TWO_LOG2_E) + 1.0)
        derivative = 1.0 - tanh * tanh
        x = tanh * outer
    return x, derivative


@triton.jit
def fold_kernel(
    z_ptr,
    p_ptr,
    bias_ptr,
    target_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    picked_ptr,
    mean_ptr,
    start,
    columns,
    d,
    stride_z,
    stride_p,
    stride_mean,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    JACOBIAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of a block: fold its logits into (max, sum, target), write exp times slope, and
    rescale the row of the running mean where the maximum rose."""
    i_row = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK_V)
    m_v = o_v < columns
    # [BLOCK_V]
    z = _row(z_ptr + i_row * stride_z, bias_ptr + start, o_v, m_v, HAS_BIAS)
    x, derivative = _transform(z, inner, outer, SOFTCAP)
    x = tl.where(m_v, x, -float("inf"))

    before = tl.load(maximum_ptr + i_row)
    maximum = tl.maximum(before, tl.max(x, axis=0))
    lowered = before - maximum
    rescale = tl.exp2(lowered)
    e = tl.exp2(x - maximum)
    total = tl.load(total_ptr + i_row)
    if ENTROPY:
        weighted = rescale * (tl.load(weighted_ptr + i_row) + total * lowered)
        weighted += tl.sum(e * tl.where(e > 0, x - maximum, 0.0), axis=0)
        tl.store(weighted_ptr + i_row, weighted)
    tl.store(total_ptr + i_row, total * rescale + tl.sum(e, axis=0))
    tl.store(maximum_ptr + i_row, maximum)

    local = tl.load(target_ptr + i_row) - start
    if (local >= 0) & (local < columns):
        tl.store(picked_ptr + i_row, tl.sum(tl.where(o_v == local, x, 0.0), axis=0))

    if JACOBIAN:
        if SOFTCAP:
            e = e * derivative
        tl.store(p_ptr + i_row * stride_p + o_v, e.to(p_ptr.dtype.element_ty), mask=m_v)
        if rescale < 1.0:
            for first in range(0, d, BLOCK_D):
                o_d = first + tl.arange(0, BLOCK_D)
                p_mean = mean_ptr + i_row * stride_mean + o_d
                mean = tl.load(p_mean, mask=o_d < d, other=0.0)
                tl.store(p_mean, mean * rescale, mask=o_d < d)


@triton.jit
def grad_kernel(
    z_ptr,
    dz_ptr,
    bias_ptr,
    target_ptr,
    maximum_ptr,
    total_ptr,
    entropy_ptr,
    grad_ptr,
    grad_entropy_ptr,
    start,
    columns,
    stride_z,
    stride_dz,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row of a block: the gradient of the uncapped logits, times the temperature."""
    i_row = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK_V)
    m_v = o_v < columns
    # [BLOCK_V]
    z = _row(z_ptr + i_row * stride_z, bias_ptr + start, o_v, m_v, HAS_BIAS)
    x, derivative = _transform(z, inner, outer, SOFTCAP)
    shifted = x - tl.load(maximum_ptr + i_row)
    total = tl.load(total_ptr + i_row)
    p = tl.exp2(shifted) / total
    dz = tl.zeros((BLOCK_V,), tl.float32)
    if HAS_GRAD:
        grad = tl.load(grad_ptr + i_row)
        local = tl.load(target_ptr + i_row) - start
        dz += tl.where(o_v == local, grad, 0.0) - grad * p
    if HAS_GRAD_ENTROPY:
        log_p = tl.where(p > 0, shifted - tl.log2(total), 0.0) * 0.6931471805599453
        dz -= tl.load(grad_entropy_ptr + i_row) * p * (log_p + tl.load(entropy_ptr + i_row))
    if SOFTCAP:
        dz = dz * derivative
    tl.store(dz_ptr + i_row * stride_dz + o_v, dz.to(dz_ptr.dtype.element_ty), mask=m_v)


@triton.jit
def fused_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    maximum_ptr,
    total_ptr,
    picked_ptr,
    mean_ptr,
    num_rows,
    vocab,
    d,
    per_split,
    stride_hidden,
    stride_weight,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of rows against one split of the vocabulary: both products, as in flash attention."""
    i_t, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_t, m_d = o_t < num_rows, o_d < d
    # [BLOCK_T, BLOCK_D]
    p_hidden = hidden_ptr + o_t[:, None] * stride_hidden + o_d[None, :]
    hidden = tl.load(p_hidden, mask=m_t[:, None] & m_d[None, :], other=0.0)
    target = tl.load(target_ptr + o_t, mask=m_t, other=-1)
    maximum = tl.full((BLOCK_T,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    picked = tl.zeros((BLOCK_T,), tl.float32)
    mean = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    end = tl.minimum((i_split + 1) * per_split, vocab)
    for start in range(i_split * per_split, end, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        m_v = o_v < end
        # [BLOCK_V, BLOCK_D]
        p_weight = weight_ptr + o_v[:, None] * stride_weight + o_d[None, :]
        weight = tl.load(p_weight, mask=m_v[:, None] & m_d[None, :], other=0.0)
        # [BLOCK_T, BLOCK_V]
        z = tl.dot(hidden, tl.trans(weight), input_precision=PRECISION)
        if HAS_BIAS:
            z += tl.load(bias_ptr + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
        x, derivative = _transform(z, inner, outer, SOFTCAP)
        x = tl.where(m_v[None, :], x, -float("inf"))
        picked += tl.sum(tl.where(o_v[None, :] == target[:, None], x, 0.0), axis=1)
        above = tl.maximum(maximum, tl.max(x, axis=1))
        rescale = tl.exp2(maximum - above)
        maximum = above
        e = tl.exp2(x - maximum[:, None])
        total = total * rescale + tl.sum(e, axis=1)
        if SOFTCAP:
            e = e * derivative
        mean = mean * rescale[:, None]
        mean += tl.dot(e.to(weight.dtype), weight, input_precision=PRECISION)
    o_out = i_split * num_rows + o_t
    tl.store(maximum_ptr + o_out, maximum, mask=m_t)
    tl.store(total_ptr + o_out, total, mask=m_t)
    tl.store(picked_ptr + o_out, picked, mask=m_t)
    p_mean = mean_ptr + o_out[:, None] * d + o_d[None, :]
    tl.store(p_mean, mean, mask=m_t[:, None] & m_d[None, :])

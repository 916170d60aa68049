"""The device code of the language-model head: a forward kernel, its gradient, and both products
of a narrow head in one kernel.

For states H [M, d] (M tokens) and a head W [N, d] (N words), in units of log 2:

    z = h_m . w_n + bias_n,    x = outer * f(z * inner),    f = tanh with a soft-cap, else identity
    m = max_n x,   l = sum_n 2^(x - m),   weighted = sum_n 2^(x - m) (x - m),   picked = x[target]
    acc = sum_n 2^(x - m) f'(z) w_n     the softmax mean of the head's rows, before division by l

``update_kernel`` is the online-softmax update of one block of the vocabulary whose products z a
matrix library has made. Grid: one program a token. Tile: [BLOCK_N], a token's products of the
block. It reads 4 bytes a product and writes 2 to 4 (2^(x - m) f', the left side of the library's
second product); where m grew it also reads and writes the token's acc, 8 d bytes. FLOPs: about ten
a product.

``finish_kernel`` makes a token's results from m, l, weighted, picked and acc, which may come from
several splits of the vocabulary. Grid: one program a token. Reads 4 (d + 3) bytes a split and the
target's row of W; writes 4 (d + 3) bytes.

``grad_kernel`` is the gradient of z: g (1[n = target] - p) - g_entropy p (log p + entropy), times
f'. Grid, tile and bytes as above.

``fused_kernel`` makes both products itself, as flash attention does, for d <= 128. Grid:
ceil(M / BLOCK_M) tiles of tokens x splits of the vocabulary. Tile: [BLOCK_M, BLOCK_N] products and
[BLOCK_M, BLOCK_D] of acc, in registers. Reads (M d + ceil(M / BLOCK_M) N d) elements, mostly from
cache; writes 4 M (d + 3) bytes a split. FLOPs: 4 M N d.

Numerics: products of 16-bit or float32 inputs summed in float32, everything after them in float32.
"""

import triton
import triton.language as tl

from ..._numbers import LOG2_E

TWO_LOG2_E = tl.constexpr(2 * LOG2_E)
LN_2 = tl.constexpr(1 / LOG2_E)
LOWEST = tl.constexpr(
    -3.4028234663852886e38
)  # so that a block of -inf alone gives exp(-inf - m) = 0


@triton.jit
def _row(p_z, p_bias, o_n, m_n, HAS_BIAS: tl.constexpr):
    """One token's products of a block, with the bias."""
    # [BLOCK_N]
    b_z = tl.load(p_z + o_n, mask=m_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_z += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    return b_z


@triton.jit
def _transform(b_z, inner, outer, SOFTCAP: tl.constexpr):
    """Products to logits in units of log 2, and the slope of the soft-cap."""
    b_x = b_z * inner
    b_slope = 1.0
    if SOFTCAP:
        b_tanh = 1.0 - 2.0 / (tl.exp2(b_x * TWO_LOG2_E) + 1.0)
        b_slope = 1.0 - b_tanh * b_tanh
        b_x = b_tanh * outer
    return b_x, b_slope


@triton.jit
def update_kernel(
    z_ptr,
    e_ptr,
    bias_ptr,
    target_ptr,
    m_ptr,
    l_ptr,
    weighted_ptr,
    picked_ptr,
    acc_ptr,
    start,
    columns,
    d,
    stride_z,
    stride_e,
    stride_acc,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    JACOBIAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token's products of a block: update m, l, weighted and picked, write exp times slope, and
    rescale the token's acc where m grew. The block at ``start`` 0 makes them; acc is not read then.

    z, e: [M, columns], of the words from ``start``. m, l, weighted, picked: [M]. acc: [M, d].
    """
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < columns
    # [BLOCK_N]
    b_z = _row(z_ptr + i_m * stride_z, bias_ptr + start, o_n, m_n, HAS_BIAS)
    b_x, b_slope = _transform(b_z, inner, outer, SOFTCAP)
    b_x = tl.where(m_n, b_x, -float("inf"))

    first_block = start == 0
    before = tl.where(first_block, LOWEST, tl.load(m_ptr + i_m))
    b_m = tl.maximum(before, tl.max(b_x, axis=0))
    lowered = before - b_m
    rescale = tl.exp2(lowered)
    b_e = tl.exp2(b_x - b_m)
    b_l = tl.where(first_block, 0.0, tl.load(l_ptr + i_m))
    if ENTROPY:
        weighted = tl.where(first_block, 0.0, tl.load(weighted_ptr + i_m))
        weighted = rescale * (weighted + b_l * lowered)
        weighted += tl.sum(b_e * tl.where(b_e > 0, b_x - b_m, 0.0), axis=0)
        tl.store(weighted_ptr + i_m, weighted)
    tl.store(l_ptr + i_m, b_l * rescale + tl.sum(b_e, axis=0))
    tl.store(m_ptr + i_m, b_m)

    local = tl.load(target_ptr + i_m) - start
    if ((local >= 0) & (local < columns)) | first_block:
        tl.store(picked_ptr + i_m, tl.sum(tl.where(o_n == local, b_x, 0.0), axis=0))

    if JACOBIAN:
        if SOFTCAP:
            b_e = b_e * b_slope
        tl.store(e_ptr + i_m * stride_e + o_n, b_e.to(e_ptr.dtype.element_ty), mask=m_n)
        if (rescale < 1.0) & (start > 0):
            for first in range(0, d, BLOCK_D):
                o_d = first + tl.arange(0, BLOCK_D)
                p_acc = acc_ptr + i_m * stride_acc + o_d
                # [BLOCK_D]
                b_acc = tl.load(p_acc, mask=o_d < d, other=0.0)
                tl.store(p_acc, b_acc * rescale, mask=o_d < d)


@triton.jit
def finish_kernel(
    m_ptr,
    l_ptr,
    weighted_ptr,
    picked_ptr,
    acc_ptr,
    weight_ptr,
    target_ptr,
    rows_ptr,
    log_prob_ptr,
    entropy_ptr,
    out_m_ptr,
    out_l_ptr,
    jacobian_ptr,
    num_tokens,
    splits,
    vocab,
    d,
    stride_weight,
    stride_column,
    outer,
    temperature,
    HAS_ROWS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    JACOBIAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token: its log-probability, entropy, m, l and Jacobian row, 0 where it is not counted.

    m, l, picked: [splits, M]; weighted: [1, M]; acc: [splits, M, d]. rows: [M], where the token's
    results go. A target beyond the vocabulary is in another shard of it.
    """
    i_m = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S).to(tl.int64)
    # [BLOCK_S]
    b_top = tl.full((BLOCK_S,), LOWEST, tl.float32)
    for split in range(0, splits, BLOCK_S):
        p_m = m_ptr + (split + o_s) * num_tokens + i_m
        b_top = tl.maximum(b_top, tl.load(p_m, mask=split + o_s < splits, other=LOWEST))
    top = tl.max(b_top, axis=0)
    b_l = tl.zeros((BLOCK_S,), tl.float32)
    b_picked = tl.zeros((BLOCK_S,), tl.float32)
    for split in range(0, splits, BLOCK_S):
        o_split = (split + o_s) * num_tokens + i_m
        m_s = split + o_s < splits
        b_scale = tl.exp2(tl.load(m_ptr + o_split, mask=m_s, other=LOWEST) - top)
        b_l += b_scale * tl.load(l_ptr + o_split, mask=m_s, other=0.0)
        b_picked += tl.load(picked_ptr + o_split, mask=m_s, other=0.0)
    l = tl.sum(b_l, axis=0)
    picked = tl.sum(b_picked, axis=0)

    target = tl.load(target_ptr + i_m)
    counted = target >= 0
    here = counted & (target < vocab)
    i_out = i_m
    if HAS_ROWS:
        i_out = tl.load(rows_ptr + i_m)
    tl.store(out_m_ptr + i_out, top)
    tl.store(out_l_ptr + i_out, l)
    log_l = tl.log2(l)
    tl.store(log_prob_ptr + i_out, tl.where(counted, picked - top - log_l, 0.0) * LN_2)
    if ENTROPY:
        entropy = log_l - tl.load(weighted_ptr + i_m) / l
        tl.store(entropy_ptr + i_out, tl.where(counted, entropy, 0.0) * LN_2)
    if JACOBIAN:
        slope = 1.0
        if SOFTCAP:
            slope = 1.0 - (picked / outer) * (picked / outer)
        for first in range(0, d, BLOCK_D):
            o_d = first + tl.arange(0, BLOCK_D)
            m_d = o_d < d
            b_acc = tl.zeros((BLOCK_D,), tl.float32)
            for split in range(0, splits, BLOCK_S):
                o_split = (split + o_s) * num_tokens + i_m
                m_s = split + o_s < splits
                # [BLOCK_S]
                b_scale = tl.exp2(tl.load(m_ptr + o_split, mask=m_s, other=LOWEST) - top)
                # [BLOCK_S, BLOCK_D]
                p_acc = acc_ptr + o_split[:, None] * d + o_d[None, :]
                b_part = tl.load(p_acc, mask=m_s[:, None] & m_d[None, :], other=0.0)
                b_acc += tl.sum(b_part * b_scale[:, None], axis=0)
            # [BLOCK_D]
            p_weight = weight_ptr + target * stride_weight + o_d * stride_column
            b_chosen = tl.load(p_weight, mask=m_d & here, other=0.0).to(tl.float32)
            b_jacobian = (slope * b_chosen - b_acc / l) / temperature
            b_jacobian = tl.where(counted, b_jacobian, 0.0)
            tl.store(jacobian_ptr + i_out * d + o_d, b_jacobian, mask=m_d)


@triton.jit
def grad_kernel(
    z_ptr,
    dz_ptr,
    bias_ptr,
    target_ptr,
    m_ptr,
    l_ptr,
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
    BLOCK_N: tl.constexpr,
):
    """One token's products of a block: the gradient of the uncapped logits, times the temperature;
    0 where the token is not counted.

    z, dz: [M, columns], of the words from ``start``; the rest [M].
    """
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < columns
    # [BLOCK_N]
    b_z = _row(z_ptr + i_m * stride_z, bias_ptr + start, o_n, m_n, HAS_BIAS)
    b_x, b_slope = _transform(b_z, inner, outer, SOFTCAP)
    b_shifted = b_x - tl.load(m_ptr + i_m)
    b_l = tl.load(l_ptr + i_m)
    b_p = tl.exp2(b_shifted) / b_l
    b_dz = tl.zeros((BLOCK_N,), tl.float32)
    target = tl.load(target_ptr + i_m)
    if HAS_GRAD:
        grad = tl.load(grad_ptr + i_m)
        local = target - start
        b_dz += tl.where(o_n == local, grad, 0.0) - grad * b_p
    if HAS_GRAD_ENTROPY:
        b_log_p = tl.where(b_p > 0, b_shifted - tl.log2(b_l), 0.0) * 0.6931471805599453
        b_dz -= tl.load(grad_entropy_ptr + i_m) * b_p * (b_log_p + tl.load(entropy_ptr + i_m))
    if SOFTCAP:
        b_dz = b_dz * b_slope
    b_dz = tl.where(target >= 0, b_dz, 0.0)
    tl.store(dz_ptr + i_m * stride_dz + o_n, b_dz.to(dz_ptr.dtype.element_ty), mask=m_n)


@triton.jit
def fused_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    m_ptr,
    l_ptr,
    picked_ptr,
    acc_ptr,
    num_tokens,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of tokens against one split of the vocabulary: both products, as in flash attention.

    m, l, picked: [splits, M]. acc: [splits, M, d].
    """
    i_m, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < num_tokens, o_d < d
    # [BLOCK_M, BLOCK_D]
    p_hidden = hidden_ptr + o_m[:, None] * stride_hidden + o_d[None, :]
    b_hidden = tl.load(p_hidden, mask=m_m[:, None] & m_d[None, :], other=0.0)
    # [BLOCK_M]
    b_target = tl.load(target_ptr + o_m, mask=m_m, other=-1)
    b_m = tl.full((BLOCK_M,), -3.4e38, tl.float32)
    b_l = tl.zeros((BLOCK_M,), tl.float32)
    b_picked = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.minimum((i_split + 1) * per_split, vocab)
    for start in range(i_split * per_split, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        # [BLOCK_N, BLOCK_D]
        p_weight = weight_ptr + o_n[:, None] * stride_weight + o_d[None, :]
        b_weight = tl.load(p_weight, mask=m_n[:, None] & m_d[None, :], other=0.0)
        # [BLOCK_M, BLOCK_N]
        b_z = tl.dot(b_hidden, tl.trans(b_weight), input_precision=PRECISION)
        if HAS_BIAS:
            b_z += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_x, b_slope = _transform(b_z, inner, outer, SOFTCAP)
        b_x = tl.where(m_n[None, :], b_x, -float("inf"))
        b_picked += tl.sum(tl.where(o_n[None, :] == b_target[:, None], b_x, 0.0), axis=1)
        b_above = tl.maximum(b_m, tl.max(b_x, axis=1))
        b_rescale = tl.exp2(b_m - b_above)
        b_m = b_above
        b_e = tl.exp2(b_x - b_m[:, None])
        b_l = b_l * b_rescale + tl.sum(b_e, axis=1)
        if SOFTCAP:
            b_e = b_e * b_slope
        b_acc = b_acc * b_rescale[:, None]
        b_acc += tl.dot(b_e.to(b_weight.dtype), b_weight, input_precision=PRECISION)
    o_out = i_split * num_tokens + o_m
    tl.store(m_ptr + o_out, b_m, mask=m_m)
    tl.store(l_ptr + o_out, b_l, mask=m_m)
    tl.store(picked_ptr + o_out, b_picked, mask=m_m)
    p_acc = acc_ptr + o_out[:, None] * d + o_d[None, :]
    tl.store(p_acc, b_acc, mask=m_m[:, None] & m_d[None, :])

"""The language-model head in flash form with Triton kernels.

Two ways: library products with one kernel that folds a block of logits between them, for any width;
and, for narrow heads, one kernel that does both products itself. Float64 has no kernels.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .config import HeadSettings
from .head import (
    LOG2_E,
    HeadForward,
    HeadGradients,
    accumulate_dtype,
    addmm,
    empty_forward,
    row_parts,
    slope,
)

ROW_TILE = 4096  # rows of one pass over the vocabulary
BLOCK_COLUMNS = 2048  # vocabulary of a block: 32 MiB of float32 logits stay in the L2 cache
FUSED_WIDTH = 128  # the widest head that the fused kernel takes
FUSED_ROWS, FUSED_COLUMNS = 64, 64
FUSED_PROGRAMS = 264  # two on each multiprocessor: few rows split the vocabulary
TWO_LOG2_E = tl.constexpr(2 * LOG2_E)


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
def _fold_kernel(
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
    z = tl.load(z_ptr + i_row * stride_z + o_v, mask=m_v, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + start + o_v, mask=m_v, other=0.0).to(tl.float32)
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
def _grad_kernel(
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
    z = tl.load(z_ptr + i_row * stride_z + o_v, mask=m_v, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + start + o_v, mask=m_v, other=0.0).to(tl.float32)
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
def _fused_kernel(
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


def _scales(settings: HeadSettings) -> tuple[float, float]:
    scale = LOG2_E / settings.temperature
    if settings.softcap is None:
        return scale, 1.0
    return 1 / settings.softcap, settings.softcap * scale


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def head_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    differentiated: torch.Tensor | None,
    mode: str,
    settings: HeadSettings,
) -> HeadForward:
    """As ``impl_torch.head_forward``; logits are never stored."""
    if accumulate_dtype(settings.compute) != torch.float32:
        raise RuntimeError("impl='triton' has no float64 kernels; use impl='torch'")
    counted, d = targets >= 0, hidden.shape[1]
    out = empty_forward(hidden, weight, mode, settings)
    for rows, with_jacobian in row_parts(counted, differentiated, mode == "jacobian"):
        for tile in rows.split(ROW_TILE):
            if not tile.numel():
                continue
            states, target = hidden[tile].to(settings.compute), targets[tile]
            fused = with_jacobian and d <= FUSED_WIDTH and not settings.entropy
            run = _fused if fused else _folded
            found = run(states, weight, target, bias, with_jacobian, settings)
            _finish(out, tile, weight, target, counted[tile], found, settings)
    return out


def _finish(
    out: HeadForward,
    rows: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    counted: torch.Tensor,
    found: tuple[torch.Tensor, ...],
    settings: HeadSettings,
) -> None:
    """Write a tile's results: (maximum, total, weighted, picked, mean or None)."""
    maximum, total, weighted, picked, mean = found
    log_total = total.log2()
    out.maximum[rows], out.total[rows] = maximum, total
    out.log_prob[rows] = torch.where(counted, picked - maximum - log_total, 0.0) / LOG2_E
    if settings.entropy:
        out.entropy[rows] = torch.where(counted, log_total - weighted / total, 0.0) / LOG2_E
    if mean is not None:
        chosen = weight[target.clamp(min=0)].to(mean.dtype)
        if settings.softcap is not None:
            chosen *= slope(picked / _scales(settings)[1])[:, None]
        chosen -= mean / total[:, None]
        out.jacobian[rows] = torch.where(counted[:, None], chosen / settings.temperature, 0.0)


def _folded(
    states: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    jacobian: bool,
    settings: HeadSettings,
) -> tuple[torch.Tensor, ...]:
    """Library products with the fold kernel between them."""
    num, d = states.shape
    vocab = weight.shape[0]
    maximum = states.new_full((num,), torch.finfo(torch.float32).min, dtype=torch.float32)
    total, weighted, picked = (torch.zeros_like(maximum) for _ in range(3))
    mean = states.new_zeros(num, d, dtype=torch.float32) if jacobian else None
    width = min(BLOCK_COLUMNS, vocab)
    z = states.new_empty(num * width, dtype=torch.float32)
    p = states.new_empty(num * width if jacobian else 0)
    inner, outer = _scales(settings)
    for start in range(0, vocab, width):
        block = weight[start : start + width].to(states.dtype)
        columns = block.shape[0]
        logits = _product(states, block.T, z[: num * columns].view(num, columns))
        # without a Jacobian nothing is written: any pointer will do
        into = p[: num * columns].view(num, columns) if jacobian else logits
        _fold_kernel[(num,)](
            logits,
            into,
            bias if bias is not None else logits,
            target,
            maximum,
            total,
            weighted,
            picked,
            mean if jacobian else logits,
            start,
            columns,
            d,
            columns,
            columns,
            d,
            inner,
            outer,
            HAS_BIAS=bias is not None,
            SOFTCAP=settings.softcap is not None,
            ENTROPY=settings.entropy,
            JACOBIAN=jacobian,
            BLOCK_V=triton.next_power_of_2(width),
            BLOCK_D=min(1024, triton.next_power_of_2(d)),
            num_warps=8,
        )
        if mean is not None:
            addmm(mean, into, block)
    return maximum, total, weighted, picked, mean


def _fused(
    states: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    jacobian: bool,
    settings: HeadSettings,
) -> tuple[torch.Tensor | None, ...]:
    """One kernel for a narrow head; splits of the vocabulary are merged by their maxima."""
    num, d = states.shape
    vocab = weight.shape[0]
    tiles = triton.cdiv(num, FUSED_ROWS)
    splits = max(1, min(FUSED_PROGRAMS // tiles, triton.cdiv(vocab, 8 * FUSED_COLUMNS)))
    per_split = triton.cdiv(triton.cdiv(vocab, splits), FUSED_COLUMNS) * FUSED_COLUMNS
    splits = triton.cdiv(vocab, per_split)
    maximum, total, picked = states.new_empty(3, splits, num, dtype=torch.float32)
    mean = states.new_empty(splits, num, d, dtype=torch.float32)
    weight = weight.to(states.dtype)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    inner, outer = _scales(settings)
    _fused_kernel[(tiles, splits)](
        states,
        weight,
        bias if bias is not None else weight,
        target,
        maximum,
        total,
        picked,
        mean,
        num,
        vocab,
        d,
        per_split,
        states.stride(0),
        weight.stride(0),
        inner,
        outer,
        HAS_BIAS=bias is not None,
        SOFTCAP=settings.softcap is not None,
        PRECISION="ieee",
        BLOCK_T=FUSED_ROWS,
        BLOCK_V=FUSED_COLUMNS,
        BLOCK_D=max(16, triton.next_power_of_2(d)),
        num_warps=4,
        num_stages=2,
    )
    top = maximum.amax(0)
    scale = (maximum - top).exp2()
    total = (total * scale).sum(0)
    return top, total, None, picked.sum(0), (mean * scale[..., None]).sum(0)


def head_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    forward: HeadForward,
    grad_log_prob: torch.Tensor | None,  # [T]
    grad_entropy: torch.Tensor | None,  # [T]
    needed: tuple[bool, bool, bool],  # hidden, weight, bias
    settings: HeadSettings,
) -> HeadGradients:
    """As ``impl_torch.head_backward``, from recomputed logits."""
    compute, dtype = settings.compute, torch.float32
    counted = targets >= 0
    live = torch.zeros_like(counted)
    for grad in (grad_log_prob, grad_entropy):
        if grad is not None:
            live |= grad != 0
    ((rows, _),) = row_parts(counted & live, None, False)
    vocab, d = weight.shape
    tiles = [tile for tile in rows.split(ROW_TILE) if tile.numel()]
    d_hidden = hidden.new_zeros(rows.numel() if needed[0] else 0, d, dtype=dtype)
    d_weight = torch.empty_like(weight) if needed[1] else None
    d_bias = torch.empty_like(bias) if needed[2] else None
    width = min(BLOCK_COLUMNS, vocab)
    size = min(rows.numel(), ROW_TILE) * width
    z, dz = hidden.new_empty(size, dtype=dtype), hidden.new_empty(size, dtype=compute)
    for start in range(0, vocab, width):
        block = weight[start : start + width].to(compute)
        columns = block.shape[0]
        dw = hidden.new_zeros(columns if needed[1] else 0, d, dtype=dtype)
        db = hidden.new_zeros(columns if needed[2] else 0, dtype=dtype)
        for i, tile in enumerate(tiles):
            states = hidden[tile].to(compute)
            shape = (tile.numel(), columns)
            logits = _product(states, block.T, z[: shape[0] * columns].view(shape))
            grad = dz[: shape[0] * columns].view(shape)
            _launch_grad(
                logits,
                grad,
                bias,
                start,
                tile,
                (targets, forward.maximum, forward.total, forward.entropy),
                (grad_log_prob, grad_entropy),
                settings,
            )
            if needed[0]:
                addmm(d_hidden[i * ROW_TILE : i * ROW_TILE + shape[0]], grad, block)
            if needed[1]:
                addmm(dw, grad.T, states)
            if needed[2]:
                db += grad.sum(0, dtype=dtype)
        if d_weight is not None:
            d_weight[start : start + width] = dw.div_(settings.temperature)
        if d_bias is not None:
            d_bias[start : start + width] = db.div_(settings.temperature)
    grad_hidden = None
    if needed[0]:
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[rows] = d_hidden.div_(settings.temperature).to(hidden.dtype)
    return HeadGradients(grad_hidden, d_weight, d_bias)


def _launch_grad(
    logits: torch.Tensor,
    grad: torch.Tensor,
    bias: torch.Tensor | None,
    start: int,
    rows: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    incoming: tuple[torch.Tensor | None, torch.Tensor | None],
    settings: HeadSettings,
) -> None:
    num, columns = logits.shape
    targets, maximum, total, entropy = saved
    inner, outer = _scales(settings)
    target = targets[rows]

    def of(values: torch.Tensor | None) -> torch.Tensor:
        return logits if values is None or not values.numel() else values[rows].float()

    _grad_kernel[(num,)](
        logits,
        grad,
        bias if bias is not None else logits,
        target,
        of(maximum),
        of(total),
        of(entropy),
        of(incoming[0]),
        of(incoming[1]),
        start,
        columns,
        columns,
        columns,
        inner,
        outer,
        HAS_BIAS=bias is not None,
        SOFTCAP=settings.softcap is not None,
        HAS_GRAD=incoming[0] is not None,
        HAS_GRAD_ENTROPY=incoming[1] is not None,
        BLOCK_V=triton.next_power_of_2(columns),
        num_warps=8,
    )


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ships, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    flags: dict[str, Any] = {"HAS_BIAS": True, "BLOCK_V": BLOCK_COLUMNS}
    fold = flags | {"ENTROPY": True, "JACOBIAN": True, "BLOCK_D": 1024}
    grad = flags | {"HAS_GRAD": True, "HAS_GRAD_ENTROPY": True}
    tile = {"HAS_BIAS": True, "BLOCK_T": FUSED_ROWS, "BLOCK_V": FUSED_COLUMNS}
    fused = [tile | {"PRECISION": "ieee", "BLOCK_D": d} for d in (16, 32, 64, FUSED_WIDTH)]
    found = []
    for compute in ("bf16", "fp16", "fp32"):
        for softcap in (False, True):
            cap = {"SOFTCAP": softcap}
            found.append(_aot(_fold_kernel, compute, fold | cap, 8, 1, False))
            found.append(_aot(_grad_kernel, compute, grad | cap, 8, 1, False))
            tensor_cores = compute != "fp32"
            found += [_aot(_fused_kernel, compute, f | cap, 4, 2, tensor_cores) for f in fused]
    return found


def _aot(
    kernel: Any, compute: str, constexprs: dict[str, Any], warps: int, stages: int, mma: bool
) -> dict[str, Any]:
    kinds = {"target_ptr": "*i64", "inner": "fp32", "outer": "fp32"}
    narrow = ("p_ptr", "dz_ptr", "hidden_ptr", "weight_ptr", "bias_ptr")
    signature = {}
    for name in kernel.arg_names:
        kind = f"*{compute}" if name in narrow else "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constexprs else kinds.get(name, kind)
    return {
        "name": f"policy.{kernel.fn.__name__.strip('_')}",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": warps,
        "num_stages": stages,
        "uses_tensor_cores": mma,
    }

"""The language-model head in flash form: how the kernels of ``triton_kernels`` are launched.

Two ways: library products with one kernel that folds a block of logits between them, for any width;
and, for narrow heads, one kernel that does both products itself. Float64 has no kernels.
"""

from typing import Any

import torch
import triton

from ..._numbers import LOG2_E
from .common import (
    HeadForward,
    HeadGradients,
    HeadSettings,
    accumulate_dtype,
    addmm,
    block_gradients,
    empty_forward,
    live_rows,
    row_parts,
    slope,
)
from .triton_kernels import fold_kernel, fused_kernel, grad_kernel

ROW_TILE = 4096  # rows of one pass over the vocabulary
BLOCK_COLUMNS = 2048  # vocabulary of a block: 32 MiB of float32 logits stay in the L2 cache
FUSED_WIDTH = 128  # the widest head that the fused kernel takes
FUSED_TYPES = (torch.bfloat16, torch.float16)  # without tensor cores its tiles do not fit registers
FUSED_ROWS, FUSED_COLUMNS = 64, 32
FUSED_ROWS_SOFTCAP = 32  # the slopes are a third tile in registers
FUSED_PROGRAMS = 264  # two on each multiprocessor: few rows split the vocabulary
BLOCK_SIZES = (  # that tests may change
    *("ROW_TILE", "BLOCK_COLUMNS", "FUSED_WIDTH", "FUSED_TYPES", "FUSED_ROWS", "FUSED_COLUMNS"),
    *("FUSED_ROWS_SOFTCAP", "FUSED_PROGRAMS"),
)


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
    """As ``torch.head_forward``; logits are never stored."""
    if accumulate_dtype(settings.compute) != torch.float32:
        raise RuntimeError("impl='triton' has no float64 kernels; use impl='torch'")
    counted, d = targets >= 0, hidden.shape[1]
    out = empty_forward(hidden, weight, mode, settings)
    for rows, with_jacobian in row_parts(counted, differentiated, mode == "jacobian"):
        for tile in rows.split(ROW_TILE):
            if not tile.numel():
                continue
            states, target = hidden[tile].to(settings.compute), targets[tile]
            narrow = d <= FUSED_WIDTH and settings.compute in FUSED_TYPES
            fused = with_jacobian and narrow and not settings.entropy
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
        fold_kernel[(num,)](
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
    row_tile = FUSED_ROWS if settings.softcap is None else FUSED_ROWS_SOFTCAP
    tiles = triton.cdiv(num, row_tile)
    splits = max(1, min(FUSED_PROGRAMS // tiles, triton.cdiv(vocab, 8 * FUSED_COLUMNS)))
    per_split = triton.cdiv(triton.cdiv(vocab, splits), FUSED_COLUMNS) * FUSED_COLUMNS
    splits = triton.cdiv(vocab, per_split)
    maximum, total, picked = states.new_empty(3, splits, num, dtype=torch.float32)
    mean = states.new_empty(splits, num, d, dtype=torch.float32)
    weight = weight.to(states.dtype)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    inner, outer = _scales(settings)
    fused_kernel[(tiles, splits)](
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
        BLOCK_T=row_tile,
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
    """As ``torch.head_backward``, from recomputed logits."""
    compute, dtype = settings.compute, torch.float32
    rows = live_rows(targets, grad_log_prob, grad_entropy)
    size = min(rows.numel(), ROW_TILE) * min(BLOCK_COLUMNS, weight.shape[0])
    z, dz = hidden.new_empty(size, dtype=dtype), hidden.new_empty(size, dtype=compute)

    def grad_logits(
        states: torch.Tensor, block: torch.Tensor, start: int, tile: torch.Tensor, first: int
    ) -> torch.Tensor:
        shape = (tile.numel(), block.shape[0])
        logits = _product(states, block.T, z[: shape[0] * shape[1]].view(shape))
        grad = dz[: shape[0] * shape[1]].view(shape)
        saved = (targets, forward.maximum, forward.total, forward.entropy)
        incoming = (grad_log_prob, grad_entropy)
        _launch_grad(logits, grad, bias, start, tile, saved, incoming, settings)
        return grad

    return block_gradients(
        hidden, weight, bias, rows, BLOCK_COLUMNS, ROW_TILE, needed, settings, grad_logits
    )


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

    grad_kernel[(num,)](
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
    tile = {"HAS_BIAS": True, "PRECISION": "ieee", "BLOCK_V": FUSED_COLUMNS}
    found = []
    for compute in ("bf16", "fp16", "fp32"):
        for rows, softcap in ((FUSED_ROWS, False), (FUSED_ROWS_SOFTCAP, True)):
            cap = {"SOFTCAP": softcap}
            found.append(_aot(fold_kernel, compute, fold | cap, 8, 1, False))
            found.append(_aot(grad_kernel, compute, grad | cap, 8, 1, False))
            for d in (16, 32, 64, FUSED_WIDTH) if compute != "fp32" else ():
                shape = tile | cap | {"BLOCK_T": rows, "BLOCK_D": d}
                found.append(_aot(fused_kernel, compute, shape, 4, 2, True))
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
        "name": f"logprob.{kernel.fn.__name__.strip('_')}",
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": warps,
        "num_stages": stages,
        "uses_tensor_cores": mma,
    }

"""The language-model head in flash form: how the kernels of ``triton_kernels`` are launched.

What is computed is that of ``torch.py``; there are two ways. For any width a matrix library makes
the products of ROW_TILE rows and BLOCK_COLUMNS words, and ``update_kernel`` takes them into the
online softmax; with a Jacobian the library then multiplies its exponentials with the head. For
narrow heads (d <= FUSED_WIDTH) ``fused_kernel`` does both products, and few rows split the
vocabulary. ``finish_kernel`` makes the results. Logits are never stored: ``grad_kernel`` makes
gradients from recomputed products.

Which rows are counted is read back from the device, so that only those take part; with
``settings.every_row``, and while a CUDA graph is captured, all rows do and nothing waits.

Memory above the results: BLOCK_COLUMNS logits a row (float32, and their exponentials in the type of
the products); with splits, their m, l, picked and acc. Float64 has no kernels.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton

from ..._dispatch import is_capturing
from .common import (
    HeadForward,
    HeadGradients,
    HeadSettings,
    OnlineSoftmax,
    Rows,
    accumulate_dtype,
    addmm,
    block_gradients,
    empty_forward,
    live_rows,
    multiply,
    scales,
)
from .shards import merge, sum_over_shards
from .triton_kernels import finish_kernel, fused_kernel, grad_kernel, update_kernel

ROW_TILE = 4096  # rows of one pass over the vocabulary
BLOCK_COLUMNS = 2048  # vocabulary of a block: 32 MiB of float32 logits stay in the L2 cache
FUSED_WIDTH = 128  # the widest head that the fused kernel takes
FUSED_TYPES = (torch.bfloat16, torch.float16)  # without tensor cores its tiles do not fit registers
FUSED_ROWS, FUSED_COLUMNS = 64, 32
FUSED_ROWS_SOFTCAP = 32  # the slopes are a third tile in registers
FINISH_SPLITS = 16  # splits that the finishing kernel reads at once
FUSED_PROGRAMS = 264  # two on each multiprocessor: few rows split the vocabulary
BLOCK_SIZES = (  # that tests may change
    *("ROW_TILE", "BLOCK_COLUMNS", "FUSED_WIDTH", "FUSED_TYPES", "FUSED_ROWS", "FUSED_COLUMNS"),
    *("FUSED_ROWS_SOFTCAP", "FUSED_PROGRAMS"),
)


def head_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    differentiated: torch.Tensor | None,
    mode: str,
    settings: HeadSettings,
) -> HeadForward:
    """As ``torch.head_forward``; logits are never stored, and rows of ``differentiated`` are not
    told apart: a library's product takes all rows of its tile."""
    if accumulate_dtype(settings.compute) != torch.float32:
        raise RuntimeError("impl='triton' has no float64 kernels; use impl='torch'")
    narrow = hidden.shape[1] <= FUSED_WIDTH and settings.compute in FUSED_TYPES
    jacobian = mode == "jacobian"
    if is_capturing(hidden.device):
        settings = replace(settings, every_row=True)
    out = empty_forward(hidden, weight, mode, settings)
    for rows in _parts(targets, settings):
        states = hidden if rows is None else hidden[rows]
        states = states.to(settings.compute).contiguous()
        target = targets.contiguous() if rows is None else targets[rows]
        if jacobian and narrow and not settings.entropy and settings.group is None:
            found = _fused(states, weight, target, bias, settings)
        else:
            acc = out.jacobian if rows is None else torch.empty_like(states, dtype=torch.float32)
            found = _streamed(states, weight, target, bias, acc if jacobian else None, settings)
        _finish(out, rows, weight, target, merge(found, settings), settings)
    return out


def _parts(targets: torch.Tensor, settings: HeadSettings) -> Iterator[torch.Tensor | None]:
    """Numbers of the rows of a pass, ROW_TILE at a time; None: all rows at once."""
    if settings.every_row:
        if targets.numel():
            yield None
        return
    for tile in (targets >= 0).nonzero()[:, 0].split(ROW_TILE):
        if tile.numel():
            yield tile


def _streamed(
    states: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    acc: torch.Tensor | None,  # [n, d], for the Jacobian
    settings: HeadSettings,
) -> OnlineSoftmax:
    """Library products with the update kernel between them: three launches a tile and block."""
    num = states.shape[0]
    m, l, weighted, picked = states.new_empty(4, num, dtype=torch.float32)
    size = min(num, ROW_TILE) * min(BLOCK_COLUMNS, weight.shape[0])
    z = states.new_empty(size, dtype=torch.float32)
    e = states.new_empty(size if acc is not None else 0)
    for start in range(0, weight.shape[0], BLOCK_COLUMNS):
        block = weight[start : start + BLOCK_COLUMNS].to(states.dtype)
        for first in range(0, num, ROW_TILE):
            tile = slice(first, first + ROW_TILE)
            part = None if acc is None else acc[tile]
            shape = (min(ROW_TILE, num - first), block.shape[0])
            logits = multiply(states[tile], block.T, z[: shape[0] * shape[1]].view(shape))
            # without a Jacobian nothing is written: any pointer will do
            into = logits if part is None else e[: shape[0] * shape[1]].view(shape)
            soft = OnlineSoftmax(m[tile], l[tile], weighted[tile], picked[tile], part)
            _launch_update(logits, into, bias, start, target[tile], soft, settings)
            if part is None:
                continue
            if start:
                addmm(part, into, block)
            else:
                multiply(into, block, part)
    return OnlineSoftmax(
        m[None], l[None], weighted, picked[None], None if acc is None else acc[None]
    )


def _launch_update(
    logits: torch.Tensor,  # [n, w]
    into: torch.Tensor,  # [n, w]
    bias: torch.Tensor | None,  # [V]
    start: int,
    target: torch.Tensor,  # [n]
    soft: OnlineSoftmax,
    settings: HeadSettings,
) -> None:
    num, columns = logits.shape
    inner, outer = scales(settings)
    acc = logits if soft.acc is None else soft.acc
    update_kernel[(num,)](
        z_ptr=logits,
        e_ptr=into,
        bias_ptr=bias if bias is not None else logits,
        target_ptr=target,
        m_ptr=soft.m,
        l_ptr=soft.l,
        weighted_ptr=soft.weighted,
        picked_ptr=soft.picked,
        acc_ptr=acc,
        start=start,
        columns=columns,
        d=acc.shape[1],
        stride_z=logits.stride(0),
        stride_e=into.stride(0),
        stride_acc=acc.stride(0),
        inner=inner,
        outer=outer,
        HAS_BIAS=bias is not None,
        SOFTCAP=settings.softcap is not None,
        ENTROPY=settings.entropy,
        JACOBIAN=soft.acc is not None,
        BLOCK_N=triton.next_power_of_2(columns),
        BLOCK_D=min(1024, triton.next_power_of_2(acc.shape[1])),
        num_warps=8,
    )


def _finish(
    out: HeadForward,
    rows: torch.Tensor | None,  # [n], where the results go; None: in order
    weight: torch.Tensor,
    target: torch.Tensor,  # [n]
    found: OnlineSoftmax,  # m, l, picked [splits, n], weighted [n], acc [splits, n, d]
    settings: HeadSettings,
) -> None:
    splits, num = found.m.shape
    d = weight.shape[1]
    finish_kernel[(num,)](
        m_ptr=found.m,
        l_ptr=found.l,
        weighted_ptr=found.m if found.weighted is None else found.weighted,
        picked_ptr=found.picked,
        acc_ptr=found.m if found.acc is None else found.acc,
        weight_ptr=weight,
        target_ptr=target,
        rows_ptr=target if rows is None else rows,
        log_prob_ptr=out.log_prob,
        entropy_ptr=out.entropy if settings.entropy else out.log_prob,
        out_m_ptr=out.m,
        out_l_ptr=out.l,
        jacobian_ptr=out.log_prob if found.acc is None else out.jacobian,
        num_tokens=num,
        splits=splits,
        vocab=weight.shape[0],
        d=d,
        stride_weight=weight.stride(0),
        stride_column=weight.stride(1),
        outer=scales(settings)[1],
        temperature=settings.temperature,
        HAS_ROWS=rows is not None,
        SOFTCAP=settings.softcap is not None,
        ENTROPY=settings.entropy,
        JACOBIAN=found.acc is not None,
        BLOCK_S=1 if splits == 1 else FINISH_SPLITS,
        BLOCK_D=finish_width(d, splits),
        num_warps=4,
    )


def finish_width(d: int, splits: int) -> int:
    """Columns of a step of the finishing kernel; only narrow heads have splits."""
    return min(1024 if splits == 1 else FUSED_WIDTH, triton.next_power_of_2(d))


def _fused(
    states: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    settings: HeadSettings,
) -> OnlineSoftmax:
    """One kernel for a narrow head; splits of the vocabulary are merged by their maxima."""
    num, d = states.shape
    vocab = weight.shape[0]
    width = max(16, triton.next_power_of_2(d))
    row_tile, warps = fused_tile(width, settings.softcap is not None, _is_small(states.device))
    tiles = triton.cdiv(num, row_tile)
    splits = max(1, min(FUSED_PROGRAMS // tiles, triton.cdiv(vocab, 8 * FUSED_COLUMNS)))
    per_split = triton.cdiv(triton.cdiv(vocab, splits), FUSED_COLUMNS) * FUSED_COLUMNS
    splits = triton.cdiv(vocab, per_split)
    m, l, picked = states.new_empty(3, splits, num, dtype=torch.float32)
    acc = states.new_empty(splits, num, d, dtype=torch.float32)
    weight = weight.to(states.dtype)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    inner, outer = scales(settings)
    fused_kernel[(tiles, splits)](
        hidden_ptr=states,
        weight_ptr=weight,
        bias_ptr=bias if bias is not None else weight,
        target_ptr=target,
        m_ptr=m,
        l_ptr=l,
        picked_ptr=picked,
        acc_ptr=acc,
        num_tokens=num,
        vocab=vocab,
        d=d,
        per_split=per_split,
        stride_hidden=states.stride(0),
        stride_weight=weight.stride(0),
        inner=inner,
        outer=outer,
        HAS_BIAS=bias is not None,
        SOFTCAP=settings.softcap is not None,
        PRECISION="ieee",
        BLOCK_M=row_tile,
        BLOCK_N=FUSED_COLUMNS,
        BLOCK_D=width,
        num_warps=warps,
        num_stages=2,
    )
    return OnlineSoftmax(m, l, None, picked, acc)


def fused_tile(width: int, softcap: bool, small: bool) -> tuple[int, int]:
    """Rows and warps of the fused kernel's tiles for ``width`` columns, so that registers hold
    them; ``small``: on a card without the products of a warpgroup."""
    if softcap:
        return FUSED_ROWS_SOFTCAP, 8 if width == FUSED_WIDTH else 4
    return FUSED_ROWS_SOFTCAP if small and width == FUSED_WIDTH else FUSED_ROWS, 4


def _is_small(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] < 9


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
    rows = None if settings.every_row else live_rows(targets, grad_log_prob, grad_entropy)
    size = min(hidden.shape[0] if rows is None else rows.numel(), ROW_TILE) * min(
        BLOCK_COLUMNS, weight.shape[0]
    )
    z, dz = hidden.new_empty(size, dtype=dtype), hidden.new_empty(size, dtype=compute)

    def grad_logits(
        states: torch.Tensor, block: torch.Tensor, start: int, tile: Rows, first: int
    ) -> torch.Tensor:
        shape = (states.shape[0], block.shape[0])
        logits = multiply(states, block.T, z[: shape[0] * shape[1]].view(shape))
        grad = dz[: shape[0] * shape[1]].view(shape)
        incoming = (grad_log_prob, grad_entropy)
        _launch_grad(logits, grad, bias, start, tile, targets, forward, incoming, settings)
        return grad

    return block_gradients(
        hidden,
        weight,
        bias,
        rows,
        BLOCK_COLUMNS,
        ROW_TILE,
        needed,
        settings,
        grad_logits,
        sum_over_shards,
    )


def _launch_grad(
    logits: torch.Tensor,
    grad: torch.Tensor,
    bias: torch.Tensor | None,
    start: int,
    rows: Rows,
    targets: torch.Tensor,
    forward: HeadForward,
    incoming: tuple[torch.Tensor | None, torch.Tensor | None],  # of log_prob, of the entropy
    settings: HeadSettings,
) -> None:
    num, columns = logits.shape
    inner, outer = scales(settings)

    def of(values: torch.Tensor | None) -> torch.Tensor:
        return logits if values is None or not values.numel() else values[rows].float()

    grad_kernel[(num,)](
        z_ptr=logits,
        dz_ptr=grad,
        bias_ptr=bias if bias is not None else logits,
        target_ptr=targets[rows],
        m_ptr=of(forward.m),
        l_ptr=of(forward.l),
        entropy_ptr=of(forward.entropy),
        grad_ptr=of(incoming[0]),
        grad_entropy_ptr=of(incoming[1]),
        start=start,
        columns=columns,
        stride_z=logits.stride(0),
        stride_dz=grad.stride(0),
        inner=inner,
        outer=outer,
        HAS_BIAS=bias is not None,
        SOFTCAP=settings.softcap is not None,
        HAS_GRAD=incoming[0] is not None,
        HAS_GRAD_ENTROPY=incoming[1] is not None,
        BLOCK_N=triton.next_power_of_2(columns),
        num_warps=8,
    )


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ships, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    from . import triton_shipped

    return triton_shipped.aot_configs()

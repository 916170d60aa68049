"""The language-model head in flash form: how the kernels of ``triton_kernels`` are launched.

What is computed is that of ``torch.py``; there are two ways. For any width a matrix library makes
the products of ROW_TILE rows and BLOCK_COLUMNS words, and ``update_kernel`` takes them into the
online softmax; with a Jacobian the library then multiplies its exponentials with the head. For
narrow heads (d <= FUSED_WIDTH) ``fused_kernel`` does both products, and few rows split the
vocabulary, which the launcher merges by the splits' maxima. Logits are never stored:
``grad_kernel`` makes gradients from recomputed products.

Memory above the results: BLOCK_COLUMNS logits a row (float32, and their exponentials in the type of
the products); with splits, their m, l, picked and acc. Float64 has no kernels.
"""

from typing import Any

import torch
import triton

from .common import (
    HeadForward,
    HeadGradients,
    HeadSettings,
    OnlineSoftmax,
    accumulate_dtype,
    addmm,
    block_gradients,
    empty_forward,
    live_rows,
    multiply,
    row_parts,
    scales,
    slope,
    write_results,
)
from .triton_kernels import fused_kernel, grad_kernel, update_kernel

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
# of ``aot --budget``: instructions of the row kernels and, by BLOCK_D, of the fused kernel's loop,
# without and with a soft-cap. What the code holds on sm_90, 4% above; tightened as it improves
_ROW_BUDGET = {"update_kernel": (690, 785), "grad_kernel": (345, 435)}
_FUSED_BUDGET = {16: (416, 560), 32: (466, 688), 64: (556, 619), 128: (935, 843)}


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
            if fused:
                found = _fused(states, weight, target, bias, settings)
            else:
                found = _streamed(states, weight, target, bias, with_jacobian, settings)
            picked_slope = None
            if settings.softcap is not None:
                picked_slope = slope(found.picked / scales(settings)[1])
            write_results(out, tile, weight, target, picked_slope, found, settings)
    return out


def _streamed(
    states: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    jacobian: bool,
    settings: HeadSettings,
) -> OnlineSoftmax:
    """Library products with the update kernel between them."""
    num, d = states.shape
    vocab = weight.shape[0]
    m = states.new_full((num,), torch.finfo(torch.float32).min, dtype=torch.float32)
    l, weighted, picked = (torch.zeros_like(m) for _ in range(3))
    acc = states.new_zeros(num, d, dtype=torch.float32) if jacobian else None
    width = min(BLOCK_COLUMNS, vocab)
    z = states.new_empty(num * width, dtype=torch.float32)
    e = states.new_empty(num * width if jacobian else 0)
    inner, outer = scales(settings)
    for start in range(0, vocab, width):
        block = weight[start : start + width].to(states.dtype)
        columns = block.shape[0]
        logits = multiply(states, block.T, z[: num * columns].view(num, columns))
        # without a Jacobian nothing is written: any pointer will do
        into = e[: num * columns].view(num, columns) if jacobian else logits
        update_kernel[(num,)](
            z_ptr=logits,
            e_ptr=into,
            bias_ptr=bias if bias is not None else logits,
            target_ptr=target,
            m_ptr=m,
            l_ptr=l,
            weighted_ptr=weighted,
            picked_ptr=picked,
            acc_ptr=acc if acc is not None else logits,
            start=start,
            columns=columns,
            d=d,
            stride_z=logits.stride(0),
            stride_e=into.stride(0),
            stride_acc=d,
            inner=inner,
            outer=outer,
            HAS_BIAS=bias is not None,
            SOFTCAP=settings.softcap is not None,
            ENTROPY=settings.entropy,
            JACOBIAN=jacobian,
            BLOCK_N=triton.next_power_of_2(width),
            BLOCK_D=min(1024, triton.next_power_of_2(d)),
            num_warps=8,
        )
        if acc is not None:
            addmm(acc, into, block)
    return OnlineSoftmax(m, l, weighted, picked, acc)


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
    row_tile, warps = _fused_tile(width, settings.softcap is not None, _is_small(states.device))
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
    top = m.amax(0)
    scale = (m - top).exp2()
    l = (l * scale).sum(0)
    return OnlineSoftmax(top, l, None, picked.sum(0), (acc * scale[..., None]).sum(0))


def _fused_tile(width: int, softcap: bool, small: bool) -> tuple[int, int]:
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
    rows = live_rows(targets, grad_log_prob, grad_entropy)
    size = min(rows.numel(), ROW_TILE) * min(BLOCK_COLUMNS, weight.shape[0])
    z, dz = hidden.new_empty(size, dtype=dtype), hidden.new_empty(size, dtype=compute)

    def grad_logits(
        states: torch.Tensor, block: torch.Tensor, start: int, tile: torch.Tensor, first: int
    ) -> torch.Tensor:
        shape = (tile.numel(), block.shape[0])
        logits = multiply(states, block.T, z[: shape[0] * shape[1]].view(shape))
        grad = dz[: shape[0] * shape[1]].view(shape)
        incoming = (grad_log_prob, grad_entropy)
        _launch_grad(logits, grad, bias, start, tile, targets, forward, incoming, settings)
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
    flags: dict[str, Any] = {"HAS_BIAS": True, "BLOCK_N": BLOCK_COLUMNS}
    update = flags | {"ENTROPY": True, "JACOBIAN": True, "BLOCK_D": 1024}
    grad = flags | {"HAS_GRAD": True, "HAS_GRAD_ENTROPY": True}
    tile = {"HAS_BIAS": True, "PRECISION": "ieee", "BLOCK_N": FUSED_COLUMNS}
    found = []
    for compute in ("bf16", "fp16", "fp32"):
        for softcap in (False, True):
            cap = {"SOFTCAP": softcap}
            row = _row_work(4 if compute == "fp32" else 2)
            for kernel, constants in ((update_kernel, update), (grad_kernel, grad)):
                budget = {"loop": _ROW_BUDGET[kernel.fn.__name__][softcap]}
                case = _aot(kernel, compute, constants | cap, 8, 1, False)
                found.append(case | {"work": row, "budget": budget})
            for d in (16, 32, 64, FUSED_WIDTH) if compute != "fp32" else ():
                for small in (False, True):
                    rows, warps = _fused_tile(d, softcap, small)
                    shape = tile | cap | {"BLOCK_M": rows, "BLOCK_D": d}
                    case = _aot(fused_kernel, compute, shape, warps, 2, True)
                    case["targets"] = ("sm_80",) if small else ("sm_90", "sm_100", "gfx942")
                    budget = {"loop": _FUSED_BUDGET[d][softcap], "epilogue_shuffles": 0}
                    budget["wgmma"] = not softcap
                    found.append(case | {"work": _fused_work(rows, d), "budget": budget})
    return found


def _row_work(itemsize: int) -> dict[str, Any]:
    """What a token's row of a block needs: its products read, a number written for each. The
    products are in cache, so that the floor, which is memory's, can be beaten."""
    return {
        "sizes": f"columns={BLOCK_COLUMNS}",
        "bytes": BLOCK_COLUMNS * (4 + itemsize),
        "flops": 10 * BLOCK_COLUMNS,
        "scores": BLOCK_COLUMNS,
        "straight": True,
    }


def _fused_work(block_m: int, d: int, tokens: int = 8192, vocab: int = 1 << 17) -> dict[str, Any]:
    """What a split of the vocabulary needs for a tile of tokens."""
    tiles = tokens // block_m  # run together: memory delivers a tile of the head once for all
    splits = max(1, FUSED_PROGRAMS // tiles)
    steps = vocab // splits // FUSED_COLUMNS
    return {
        "sizes": f"T={tokens} V={vocab}",
        "steps": steps,
        "bytes": FUSED_COLUMNS * (d + 1) * 2 / tiles,  # with the bias
        "flops": 4 * block_m * FUSED_COLUMNS * d,
        "scores": block_m * FUSED_COLUMNS * steps,
        # 16-bit states; float32 acc, m, l, picked
        "tile_bytes": block_m * (2 * d + 4 * (d + 3)),
    }


def _aot(
    kernel: Any, compute: str, constexprs: dict[str, Any], warps: int, stages: int, mma: bool
) -> dict[str, Any]:
    kinds = {"target_ptr": "*i64", "inner": "fp32", "outer": "fp32"}
    narrow = ("e_ptr", "dz_ptr", "hidden_ptr", "weight_ptr", "bias_ptr")
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

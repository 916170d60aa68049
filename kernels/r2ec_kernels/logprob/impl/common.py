"""What the implementations of the language-model head share: types, results and small steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup

from ..._numbers import LOG2_E

Rows = torch.Tensor | slice  # numbers of a tile's rows, int64 [n], or a range of them
STORE_BYTES = 64 << 20  # logits up to this size are stored for a trainable head, not recomputed


class LogProb(NamedTuple):
    """What :func:`r2ec_kernels.linear_logprob` returns."""

    log_prob: torch.Tensor  # [T]
    entropy: torch.Tensor | None  # [T], nats


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How a row of the language-model head becomes a distribution."""

    softcap: float | None = None
    temperature: float = 1.0
    entropy: bool = False
    compute: torch.dtype = torch.float32  # of the products' inputs
    impl: str = "torch"
    every_row: bool = False  # rows that are not counted take part: counting waits for a GPU
    group: ProcessGroup | None = None  # whose processes hold the head's rows together


class HeadForward(NamedTuple):
    """What one pass over the vocabulary yields. Rows that are not counted hold 0."""

    log_prob: torch.Tensor  # [T]
    entropy: torch.Tensor  # [T], or [0] if not asked for
    m: torch.Tensor  # [T], largest transformed logit, in units of log 2
    l: torch.Tensor  # [T], sum 2^(x - m)
    jacobian: torch.Tensor  # [T, d] d log_prob / d hidden, or [0, d]
    logits: torch.Tensor  # [T, V], counted rows first, in units of log 2 (soft-capped: tanh)


class OnlineSoftmax(NamedTuple):
    """The running values of a tile of n rows after the whole vocabulary; x in units of log 2."""

    m: torch.Tensor  # [n], largest x
    l: torch.Tensor  # [n], sum 2^(x - m)
    weighted: torch.Tensor | None  # [n], sum 2^(x - m) (x - m), for the entropy
    picked: torch.Tensor  # [n], x of the target
    acc: torch.Tensor | None  # [n, d], sum 2^(x - m) (slope of the soft-cap) w, for the Jacobian


class HeadGradients(NamedTuple):
    hidden: torch.Tensor | None  # [T, d]
    weight: torch.Tensor | None  # [V, d]
    bias: torch.Tensor | None  # [V]


def compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Type of the products' inputs. CPUs multiply float32 faster than bfloat16 without AMX."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return torch.promote_types(dtype, torch.float32) if kind == "cpu" else dtype


def accumulate_dtype(compute: torch.dtype) -> torch.dtype:
    return torch.promote_types(compute, torch.float32)


def stores_logits(rows: int, vocab: int, itemsize: int) -> bool:
    """Whether a trainable head keeps its logits (3 units) instead of recomputing them (4)."""
    return rows * vocab * itemsize <= STORE_BYTES


def empty_forward(
    hidden: torch.Tensor, weight: torch.Tensor, mode: str, settings: HeadSettings
) -> HeadForward:
    """Results of a pass that has not run: zeros, or anything where every row takes part."""
    make = hidden.new_empty if settings.every_row else hidden.new_zeros
    dtype = accumulate_dtype(settings.compute)
    (num, d), vocab = hidden.shape, weight.shape[0]
    stored = mode == "logits" and settings.impl == "torch"
    stored = stored and stores_logits(num, vocab, dtype.itemsize)
    return HeadForward(
        log_prob=make(num, dtype=dtype),
        entropy=make(num if settings.entropy else 0, dtype=dtype),
        m=make(num, dtype=dtype),
        l=make(num, dtype=dtype) if settings.every_row else hidden.new_ones(num, dtype=dtype),
        jacobian=make(num if mode == "jacobian" else 0, d, dtype=dtype),
        logits=hidden.new_empty(num if stored else 0, vocab, dtype=dtype),
    )


def row_parts(
    counted: torch.Tensor, differentiated: torch.Tensor | None, jacobian: bool
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Row numbers with and without a second product.

    Counting rows waits for the device, which a CUDA graph cannot: then every row takes part.
    """
    if counted.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        yield torch.arange(counted.numel(), device=counted.device), jacobian
        return
    if differentiated is None or not jacobian:
        yield counted.nonzero()[:, 0], jacobian
        return
    yield (counted & differentiated).nonzero()[:, 0], True
    yield (counted & ~differentiated).nonzero()[:, 0], False


def scales(settings: HeadSettings) -> tuple[float, float]:
    """(inner, outer): factors of a product before and after the soft-cap that make it a logit in
    units of log 2, temperature included; without a soft-cap the first is all."""
    scale = LOG2_E / settings.temperature
    if settings.softcap is None:
        return scale, 1.0
    return 1 / settings.softcap, settings.softcap * scale


def multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``out = left @ right``, summed in the type of ``out``."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def write_results(
    out: HeadForward,
    rows: torch.Tensor,  # [n], of the tile
    weight: torch.Tensor,
    target: torch.Tensor,  # [n]
    picked_slope: torch.Tensor | None,  # [n], of the soft-cap at the target; None without one
    found: OnlineSoftmax,
    settings: HeadSettings,
) -> None:
    """Write a tile's results; ``found.acc`` is used up. Negative targets are not counted."""
    counted = target >= 0
    log_l = found.l.log2()
    out.m[rows], out.l[rows] = found.m, found.l
    out.log_prob[rows] = torch.where(counted, found.picked - found.m - log_l, 0.0) / LOG2_E
    if found.weighted is not None and settings.entropy:
        entropy = log_l - found.weighted / found.l
        out.entropy[rows] = torch.where(counted, entropy, 0.0) / LOG2_E
    if found.acc is not None:
        chosen = weight[target.clamp(0, weight.shape[0] - 1)].to(found.acc.dtype)
        if picked_slope is not None:
            chosen *= picked_slope[:, None]
        if settings.group is not None:
            chosen.masked_fill_((target >= weight.shape[0])[:, None], 0.0)
        chosen.sub_(found.acc.div_(found.l[:, None])).div_(settings.temperature)
        out.jacobian[rows] = chosen.masked_fill_(~counted[:, None], 0.0)


def slope(tanh: torch.Tensor) -> torch.Tensor:
    """d cap(x) / dx = 1 - tanh(x / cap)^2, from the tanh itself."""
    return torch.addcmul(tanh.new_ones(()), tanh, tanh, value=-1)


def addmm(accumulator: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``accumulator += left @ right``, summed in the accumulator's type."""
    if right.dtype == accumulator.dtype:
        accumulator.addmm_(left, right)
    else:
        left = left.to(right.dtype)
        torch.addmm(accumulator, left, right, out_dtype=accumulator.dtype, out=accumulator)


def live_rows(targets: torch.Tensor, *incoming: torch.Tensor | None) -> torch.Tensor:
    """Numbers of the counted rows into which a gradient flows."""
    live = torch.zeros_like(targets, dtype=torch.bool)
    for grad in incoming:
        if grad is not None:
            live |= grad != 0
    ((rows, _),) = row_parts((targets >= 0) & live, None, False)
    return rows


def block_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor | None,
    columns: int,
    row_tile: int,
    needed: tuple[bool, bool, bool],
    settings: HeadSettings,
    grad_logits: Callable[..., torch.Tensor],
    total: Callable[[torch.Tensor, HeadSettings], torch.Tensor],
) -> HeadGradients:
    """Gradients of hidden, weight and bias (where ``needed``) from those of the logits.

    Blocks of ``columns`` of the vocabulary meet tiles of ``row_tile`` of the ``rows`` (None: all).
    ``grad_logits(states, block, start, tile, first)`` returns the gradient of a tile's uncapped
    logits times the temperature, [n, w]; ``first`` is the tile's place in ``rows``. ``total`` sums
    the gradient of the states over the shards of the vocabulary.
    """
    num = hidden.shape[0] if rows is None else rows.numel()
    d, compute, dtype = weight.shape[1], settings.compute, accumulate_dtype(settings.compute)
    d_hidden = hidden.new_zeros(num if needed[0] else 0, d, dtype=dtype)
    d_weight = torch.empty_like(weight) if needed[1] else None
    d_bias = torch.empty_like(bias) if bias is not None and needed[2] else None
    for start in range(0, weight.shape[0], columns):
        block = weight[start : start + columns].to(compute)
        dw = hidden.new_zeros(block.shape[0] if needed[1] else 0, d, dtype=dtype)
        db = hidden.new_zeros(block.shape[0] if needed[2] else 0, dtype=dtype)
        for first in range(0, num, row_tile):
            part = slice(first, first + row_tile)
            tile = part if rows is None else rows[part]
            states = hidden[tile].to(compute)
            grad = grad_logits(states, block, start, tile, first)
            if needed[0]:
                addmm(d_hidden[part], grad, block)
            if needed[1]:
                addmm(dw, grad.T, states)
            if needed[2]:
                db += grad.sum(0, dtype=dtype)
        if d_weight is not None:
            d_weight[start : start + columns] = dw.div_(settings.temperature)
        if d_bias is not None:
            d_bias[start : start + columns] = db.div_(settings.temperature)
    grad_hidden = None
    if needed[0]:
        d_hidden = total(d_hidden, settings).div_(settings.temperature).to(hidden.dtype)
        grad_hidden = d_hidden if rows is None else torch.zeros_like(hidden)
        if rows is not None:
            grad_hidden[rows] = d_hidden
    return HeadGradients(grad_hidden, d_weight, d_bias)

"""The language-model head in flash form, in plain torch: any device, never [tokens, vocab].

Blocks of the vocabulary are streamed with an online maximum. For a frozen head the same pass also
accumulates ``sum_v p_v f_v W_v``, so that it yields the log-probability and its Jacobian row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .config import HeadSettings

ROW_TILE = 1024  # rows of one pass over the vocabulary
TILE_ELEMENTS = 1 << 20  # logits of one tile: 4 MiB in float32, inside the last-level cache
MIN_BLOCK = 512  # rows of the head of one tile, at least
BLOCK_BYTES = 8 << 20  # rows of the head of one tile: its second product reads them from cache


class HeadForward(NamedTuple):
    """What one pass over the vocabulary yields. Rows that are not counted hold 0."""

    log_prob: torch.Tensor  # [T]
    entropy: torch.Tensor  # [T], or [0] if not asked for
    maximum: torch.Tensor  # [T], of the transformed logits x
    total: torch.Tensor  # [T], sum exp(x - maximum)
    jacobian: torch.Tensor  # [T, d] d log_prob / d hidden, or [0, d] if not asked for


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


def head_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    differentiated: torch.Tensor | None,
    jacobian: bool,
    settings: HeadSettings,
) -> HeadForward:
    """Log-probabilities in one unit (2 T d V operations), with the Jacobian in two.

    Args:
        hidden: [T, d].
        weight: [V, d].
        targets: int64 [T]; negative rows are skipped.
        bias: [V] or None.
        differentiated: bool [T], the rows whose gradient can differ from zero; None: all.
        jacobian: accumulate the Jacobian of the differentiated rows.
    """
    dtype = compute_dtype(hidden, weight)
    accumulate = torch.promote_types(dtype, torch.float32)
    num, width = hidden.shape
    new = torch.zeros
    out = HeadForward(
        new(num, dtype=accumulate, device=hidden.device),
        new(num if settings.entropy else 0, dtype=accumulate, device=hidden.device),
        new(num, dtype=accumulate, device=hidden.device),
        new(num, dtype=accumulate, device=hidden.device),
        new(num if jacobian else 0, width, dtype=accumulate, device=hidden.device),
    )
    for rows, with_jacobian in _parts(targets, differentiated, jacobian):
        for tile in rows.split(ROW_TILE):
            _stream(hidden, weight, targets, bias, tile, with_jacobian, dtype, settings, out)
    return out


def _parts(
    targets: torch.Tensor, differentiated: torch.Tensor | None, jacobian: bool
) -> Iterator[tuple[torch.Tensor, bool]]:
    counted = targets >= 0
    if differentiated is None or not jacobian:
        yield counted.nonzero()[:, 0], jacobian
        return
    yield (counted & differentiated).nonzero()[:, 0], True
    yield (counted & ~differentiated).nonzero()[:, 0], False


def _block_width(rows: int, width: int, vocab: int, itemsize: int) -> int:
    by_logits = TILE_ELEMENTS // max(rows, 1)
    by_bytes = BLOCK_BYTES // max(width * itemsize, 1)
    return max(1, min(max(MIN_BLOCK, min(by_logits, by_bytes)), vocab))


def _logits(
    hidden: torch.Tensor,  # [n, d]
    block: torch.Tensor,  # [w, d]
    bias: torch.Tensor | None,  # [w]
    settings: HeadSettings,
    buffer: torch.Tensor,  # [n * block width] float32/float64
    slope: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Transformed logits [n, w] in ``buffer`` and their derivative times the temperature."""
    logits = buffer[: hidden.shape[0] * block.shape[0]].view(hidden.shape[0], block.shape[0])
    if hidden.dtype == logits.dtype:
        torch.mm(hidden, block.T, out=logits)
    else:
        torch.mm(hidden, block.T, out_dtype=logits.dtype, out=logits)
    if bias is not None:
        logits += bias
    if settings.softcap is None:
        return (logits if settings.temperature == 1 else logits.div_(settings.temperature)), None
    logits.div_(settings.softcap).tanh_()
    # d cap(x)/dx = 1 - tanh(x / cap)^2, from the tanh itself
    derivative = torch.addcmul(logits.new_ones(()), logits, logits, value=-1) if slope else None
    return logits.mul_(settings.softcap / settings.temperature), derivative


def _stream(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor,  # [n], the rows of this tile
    jacobian: bool,
    dtype: torch.dtype,
    settings: HeadSettings,
    out: HeadForward,
) -> None:
    """One tile of rows against the whole vocabulary."""
    if rows.numel() == 0:
        return
    accumulate = out.total.dtype
    tile = hidden[rows].to(dtype)  # [n, d]
    target = targets[rows]
    # the lowest finite number, so that a block of -inf alone gives exp(-inf - maximum) = 0
    maximum = out.total.new_full((rows.numel(),), torch.finfo(accumulate).min)
    total, weighted, picked, picked_slope = (torch.zeros_like(maximum) for _ in range(4))
    mean = torch.zeros_like(tile, dtype=accumulate) if jacobian else None  # sum e f W
    vocab = weight.shape[0]
    width = _block_width(rows.numel(), tile.shape[1], vocab, tile.element_size())
    buffer = torch.empty(rows.numel() * width, dtype=accumulate, device=hidden.device)
    for start in range(0, vocab, width):
        block = weight[start : start + width].to(dtype)
        part = None if bias is None else bias[start : start + width].to(accumulate)
        x, slope = _logits(tile, block, part, settings, buffer, jacobian)
        local = (target - start).clamp(0, block.shape[0] - 1)[:, None]
        inside = (target >= start) & (target < start + block.shape[0])
        picked = torch.where(inside, x.gather(1, local)[:, 0], picked)
        if slope is not None:
            picked_slope = torch.where(inside, slope.gather(1, local)[:, 0], picked_slope)

        above = torch.maximum(maximum, x.amax(1))
        lowered = maximum - above
        rescale = lowered.exp()
        maximum = above
        x.sub_(above[:, None])
        e = x.exp() if settings.entropy else x.exp_()
        block_sum = e.sum(1)
        if settings.entropy:
            # sum e (x - maximum), moved along with the maximum; 0 where x = -inf
            shifted = torch.where(e > 0, x, 0.0).mul_(e).sum(1)
            weighted = rescale * (weighted + total * lowered) + shifted
        total = torch.addcmul(block_sum, total, rescale)
        if mean is not None:
            if slope is not None:
                e.mul_(slope)
            mean.mul_(rescale[:, None])
            _addmm(mean, e, block)

    out.maximum[rows], out.total[rows] = maximum, total
    out.log_prob[rows] = (picked - maximum) - total.log()
    if settings.entropy:
        out.entropy[rows] = total.log() - weighted / total
    if mean is not None:
        chosen = weight[target].to(accumulate)
        if settings.softcap is not None:
            chosen.mul_(picked_slope[:, None])
        mean.div_(total[:, None])
        out.jacobian[rows] = chosen.sub_(mean).div_(settings.temperature)


def _addmm(accumulator: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``accumulator += left @ right`` with the sum in the accumulator's type."""
    if right.dtype == accumulator.dtype:
        accumulator.addmm_(left, right)
    else:
        left = left.to(right.dtype)
        torch.addmm(accumulator, left, right, out_dtype=accumulator.dtype, out=accumulator)


def head_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    maximum: torch.Tensor,  # [T], of the forward pass
    total: torch.Tensor,  # [T], of the forward pass
    entropy: torch.Tensor | None,  # [T]
    grad_log_prob: torch.Tensor | None,  # [T]
    grad_entropy: torch.Tensor | None,  # [T]
    needed: tuple[bool, bool, bool],  # hidden, weight, bias
    settings: HeadSettings,
) -> HeadGradients:
    """Gradients from recomputed logits: one unit, and one for each of hidden and weight.

    Rows whose incoming gradient is zero are left out.
    """
    dtype = compute_dtype(hidden, weight)
    accumulate = total.dtype
    live = torch.zeros_like(targets, dtype=torch.bool)
    for grad in (grad_log_prob, grad_entropy):
        if grad is not None:
            live |= grad != 0
    rows = (live & (targets >= 0)).nonzero()[:, 0]
    vocab, d = weight.shape
    d_hidden = torch.zeros(rows.numel(), d, dtype=accumulate, device=hidden.device)
    d_weight = torch.empty_like(weight) if needed[1] else None
    d_bias = torch.empty_like(bias) if needed[2] else None
    width = _block_width(min(rows.numel(), ROW_TILE), d, vocab, dtype.itemsize)
    buffer = torch.empty(
        min(rows.numel(), ROW_TILE) * width, dtype=accumulate, device=hidden.device
    )
    tiles = rows.split(ROW_TILE) if rows.numel() else ()
    for start in range(0, vocab, width):
        end = min(start + width, vocab)
        block = weight[start:end].to(dtype)
        part = None if bias is None else bias[start:end].to(accumulate)
        dw = torch.zeros(end - start, d, dtype=accumulate, device=hidden.device)
        db = torch.zeros(end - start, dtype=accumulate, device=hidden.device)
        for i, tile_rows in enumerate(tiles):
            tile = hidden[tile_rows].to(dtype)
            x, slope = _logits(tile, block, part, settings, buffer, True)
            x.sub_(maximum[tile_rows, None])
            inverse = total[tile_rows, None].reciprocal()
            if grad_entropy is None:
                dz = x.exp_().mul_(-grad_log_prob[tile_rows, None] * inverse)
            else:
                # p (g_entropy (log p + entropy) + g_log_prob), negated
                dz = x.exp()
                scale = torch.where(dz > 0, x, 0.0)
                scale.add_((entropy[tile_rows] - total[tile_rows].log())[:, None])
                scale.mul_(-grad_entropy[tile_rows, None])
                if grad_log_prob is not None:
                    scale.sub_(grad_log_prob[tile_rows, None])
                dz.mul_(scale).mul_(inverse)
            if grad_log_prob is not None:
                local = targets[tile_rows] - start
                inside = (local >= 0) & (local < end - start)
                one = torch.where(inside, grad_log_prob[tile_rows], 0.0)
                dz.scatter_add_(1, local.clamp(0, end - start - 1)[:, None], one[:, None])
            if slope is not None:
                dz.mul_(slope)
            if needed[0]:
                _addmm(d_hidden[i * ROW_TILE : i * ROW_TILE + tile.shape[0]], dz, block)
            if needed[1]:
                _addmm(dw, dz.T, tile)
            if needed[2]:
                db += dz.sum(0)
        if d_weight is not None:
            d_weight[start:end] = dw.div_(settings.temperature)
        if d_bias is not None:
            d_bias[start:end] = db.div_(settings.temperature)
    grad_hidden = None
    if needed[0]:
        grad_hidden = torch.zeros_like(hidden)
        grad_hidden[rows] = d_hidden.div_(settings.temperature).to(hidden.dtype)
    return HeadGradients(grad_hidden, d_weight, d_bias)

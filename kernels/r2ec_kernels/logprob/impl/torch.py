"""The language-model head in flash form, in plain torch: any device, never [tokens, vocab].

Blocks of the vocabulary are streamed with an online maximum. For a frozen head the same pass also
accumulates ``sum_v p_v f_v W_v``, so that it yields the log-probability and its Jacobian row.
"""

from dataclasses import dataclass

import torch

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

ROW_TILE = 1024  # rows of one pass over the vocabulary
TILE_ELEMENTS = 1 << 19  # logits of one tile: 2 MiB in float32, inside the last-level cache
BLOCK_BYTES = 8 << 20  # rows of the head of one tile: its second product reads them from cache
MIN_BLOCK = 512  # rows of the head of one tile, at least


@dataclass(frozen=True)
class _Tiles:
    """Types, scales and buffers of a pass.

    Attributes:
        compute, accumulate: types of the products' inputs and of everything else.
        inner: factor of the product before the soft-cap (or of all, without one).
        outer: factor after the soft-cap.
        fold: multiply ``inner`` into the hidden states (not where it would be rounded to 16 bits).
        width: rows of the head of a block.
        first, second: room for the logits of a tile, and for their exponentials where the logits
            themselves are still needed then.
    """

    compute: torch.dtype
    accumulate: torch.dtype
    softcap: bool
    inner: float
    outer: float
    fold: bool
    width: int
    first: torch.Tensor
    second: torch.Tensor

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """States [n, d] as the product wants them."""
        rows = rows.to(self.compute)
        return rows * self.inner if self.fold else rows

    def logits(
        self,
        hidden: torch.Tensor,  # [n, d], of self.hidden
        block: torch.Tensor,  # [w, d]
        bias: torch.Tensor | None,  # [w]
        out: torch.Tensor,  # [n, w]
    ) -> torch.Tensor:
        """Logits in units of log 2, or the tanh of capped ones."""
        if out.dtype == hidden.dtype:
            torch.mm(hidden, block.T, out=out)
        else:
            torch.mm(hidden, block.T, out_dtype=out.dtype, out=out)
        if not self.fold:
            out.mul_(self.inner)
        if bias is not None:
            out.add_(bias.to(self.accumulate), alpha=self.inner)
        return out.tanh_() if self.softcap else out

    def shifted(self, logits: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
        """``x - maximum`` [n, w] from what :meth:`logits` gave, in its place if it can be lost."""
        out = self.second[: logits.numel()].view_as(logits) if self.second.numel() else logits
        return torch.add(-maximum[:, None], logits, alpha=self.outer, out=out)


def head_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    differentiated: torch.Tensor | None,
    mode: str,
    settings: HeadSettings,
) -> HeadForward:
    """Log-probabilities in one unit (2 T d V operations), with the Jacobian in two.

    Args:
        hidden: [T, d].
        weight: [V, d].
        targets: int64 [T]; negative rows are skipped.
        bias: [V] or None.
        differentiated: bool [T], the rows whose gradient can differ from zero; None: all.
        mode: "value"; "jacobian" also gives the differentiated rows' Jacobian; "logits" also
            gives the logits if they are few enough to store.
    """
    counted = targets >= 0
    out = empty_forward(hidden, weight, mode, settings)
    stored = out.logits.shape[0] > 0
    for rows, with_jacobian in row_parts(counted, differentiated, mode == "jacobian"):
        if not rows.numel():
            continue
        tiles = _tiles(hidden, weight, rows.numel(), settings, stored)
        for start in range(0, rows.numel(), ROW_TILE):
            tile = rows[start : start + ROW_TILE]
            store = out.logits[start : start + tile.numel()] if stored else None
            _stream(hidden, weight, targets, bias, tile, with_jacobian, store, tiles, settings, out)
    return out


def _tiles(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    num_rows: int,
    settings: HeadSettings,
    stored: bool,
) -> _Tiles:
    rows, compute = min(num_rows, ROW_TILE), settings.compute
    vocab, d = weight.shape
    by_logits = TILE_ELEMENTS // max(rows, 1)
    by_bytes = BLOCK_BYTES // max(d * compute.itemsize, 1)
    width = vocab if stored else min(max(MIN_BLOCK, min(by_logits, by_bytes)), vocab)
    accumulate = accumulate_dtype(compute)
    capped = settings.softcap is not None
    scale = LOG2_E / settings.temperature
    return _Tiles(
        compute=compute,
        accumulate=accumulate,
        softcap=capped,
        inner=1 / settings.softcap if capped else scale,
        outer=settings.softcap * scale if capped else 1.0,
        fold=compute == accumulate,
        width=width,
        first=hidden.new_empty(rows * width, dtype=accumulate),
        second=hidden.new_empty(rows * width if capped or stored else 0, dtype=accumulate),
    )


def _stream(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor,  # [n], of this tile
    jacobian: bool,
    store: torch.Tensor | None,  # [n, V], keeps the logits
    tiles: _Tiles,
    settings: HeadSettings,
    out: HeadForward,
) -> None:
    """One tile of rows against the whole vocabulary."""
    num = rows.numel()
    tile = tiles.hidden(hidden[rows])  # [n, d]
    target = targets[rows]
    # the lowest finite number, so that a block of -inf alone gives exp(-inf - maximum) = 0
    maximum = out.total.new_full((num,), torch.finfo(tiles.accumulate).min)
    total, weighted, picked = (torch.zeros_like(maximum) for _ in range(3))
    mean = torch.zeros_like(tile, dtype=tiles.accumulate) if jacobian else None  # sum e f W
    for start in range(0, weight.shape[0], tiles.width):
        block = weight[start : start + tiles.width].to(tiles.compute)
        part = None if bias is None else bias[start : start + tiles.width]
        columns = block.shape[0]
        into = tiles.first[: num * columns].view(num, columns) if store is None else store
        logits = tiles.logits(tile, block, part, into)
        local = target - start
        inside = (local >= 0) & (local < columns)
        local = local.clamp(0, columns - 1)[:, None]
        picked = torch.where(inside, logits.gather(1, local)[:, 0], picked)

        above = torch.maximum(maximum, logits.amax(1).mul_(tiles.outer))
        lowered = maximum - above
        rescale = lowered.exp2()
        maximum = above
        x = tiles.shifted(logits, maximum)
        e = x.exp2() if settings.entropy else x.exp2_()
        if settings.entropy:
            # sum e (x - maximum), moved along with the maximum; clamped because -inf * 0 is NaN
            here = x.clamp_(min=torch.finfo(x.dtype).min).mul_(e).sum(1)
            weighted = torch.addcmul(here, rescale, torch.addcmul(weighted, total, lowered))
        total = torch.addcmul(e.sum(1), total, rescale)
        if mean is not None:
            if tiles.softcap:
                e.mul_(slope(logits))
            addmm(mean.mul_(rescale[:, None]), e, block)

    out.maximum[rows], out.total[rows] = maximum, total
    log_total = total.log2()
    out.log_prob[rows] = (picked * tiles.outer - maximum - log_total) / LOG2_E
    if settings.entropy:
        out.entropy[rows] = (log_total - weighted / total) / LOG2_E
    if mean is not None:
        chosen = weight[target].to(tiles.accumulate)
        if tiles.softcap:
            chosen.mul_(slope(picked)[:, None])
        out.jacobian[rows] = chosen.sub_(mean.div_(total[:, None])).div_(settings.temperature)


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
    """Gradients from stored or recomputed logits: one unit, and one each for hidden and weight.

    Rows whose incoming gradient is zero are left out.
    """
    stored = forward.logits.shape[0] > 0
    if stored:
        rows = (targets >= 0).nonzero()[:, 0]
    else:
        rows = live_rows(targets, grad_log_prob, grad_entropy)
    tiles = _tiles(hidden, weight, rows.numel(), settings, stored)

    def grad_logits(
        states: torch.Tensor, block: torch.Tensor, start: int, tile: torch.Tensor, first: int
    ) -> torch.Tensor:
        num, columns = tile.numel(), block.shape[0]
        if stored:
            logits = forward.logits[first : first + num]
        else:
            part = None if bias is None else bias[start : start + columns]
            into = tiles.first[: num * columns].view(num, columns)
            logits = tiles.logits(tiles.hidden(states), block, part, into)
        local = targets[tile] - start
        return _grad_logits(tiles, logits, local, tile, forward, grad_log_prob, grad_entropy)

    return block_gradients(
        hidden, weight, bias, rows, tiles.width, ROW_TILE, needed, settings, grad_logits
    )


def _grad_logits(
    tiles: _Tiles,
    logits: torch.Tensor,  # [n, w]
    local: torch.Tensor,  # [n], column of the target, perhaps outside
    rows: torch.Tensor,  # [n]
    forward: HeadForward,
    grad_log_prob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of the uncapped logits times the temperature, [n, w]."""
    total = forward.total[rows]
    x = tiles.shifted(logits, forward.maximum[rows])
    if grad_entropy is None:
        dz = x.exp2_().mul_((-grad_log_prob[rows] / total)[:, None])
    else:
        # -p (g_entropy (log p + entropy) + g_log_prob)
        dz = x.exp2().mul_(-(1 / total)[:, None])
        scale = x.clamp_(min=torch.finfo(x.dtype).min).sub_(total.log2()[:, None]).div_(LOG2_E)
        scale.add_(forward.entropy[rows, None]).mul_(grad_entropy[rows, None])
        if grad_log_prob is not None:
            scale.add_(grad_log_prob[rows, None])
        dz.mul_(scale)
    if grad_log_prob is not None:
        inside = (local >= 0) & (local < dz.shape[1])
        one = torch.where(inside, grad_log_prob[rows], 0.0).to(dz.dtype)
        dz.scatter_add_(1, local.clamp(0, dz.shape[1] - 1)[:, None], one[:, None])
    return dz.mul_(slope(logits)) if tiles.softcap else dz

"""The language-model head in flash form, in plain torch: any device, never [tokens, vocabulary].

For states H [T, d] and a head W [V, d], with x = outer * f(inner * (h . w_v + bias_v)) the logit in
units of log 2 (f: tanh with a soft-cap, else identity), every row keeps an online softmax:

    m = max_v x,  l = sum_v 2^(x - m),  weighted = sum_v 2^(x - m) (x - m),
    acc = sum_v 2^(x - m) f' w_v                     (frozen head only)

    log_prob = ln 2 (x[target] - m - log2 l),  entropy = ln 2 (log2 l - weighted / l),
    d log_prob / d h = (f'[target] w[target] - acc / l) / temperature

so that one pass over the vocabulary yields the log-probability and, for a frozen head, its Jacobian
row. A trainable head keeps its logits where they are few, else backward makes them again.

Tiles: at most ROW_TILE rows against a block of the vocabulary whose logits (TILE_ELEMENTS) stay in
the last-level cache and whose rows of W (BLOCK_BYTES) do too until the second product reads them.
Reads W once a row tile, H once; writes nothing of size [T, V]. FLOPs: 2 T V d a product: one
forward without, two with the Jacobian; backward with a trainable head three (two from stored
logits). Numerics: products of ``settings.compute``, everything else float32 (float64 for float64).
"""

from dataclasses import dataclass

import torch

from ..._numbers import LOG2_E
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
    row_parts,
    scales,
    slope,
    write_results,
)
from .shards import merge, sum_over_shards

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
        prescaled: ``inner`` is multiplied into the hidden states (not where it would be rounded to
            16 bits).
        width: rows of the head of a block.
        first, second: memory for the logits of a tile, and for their exponentials where the logits
            themselves are still needed then.
    """

    compute: torch.dtype
    accumulate: torch.dtype
    softcap: bool
    inner: float
    outer: float
    prescaled: bool
    width: int
    first: torch.Tensor
    second: torch.Tensor

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """States [n, d] as the product wants them."""
        rows = rows.to(self.compute)
        return rows * self.inner if self.prescaled else rows

    def logits(
        self,
        hidden: torch.Tensor,  # [n, d], of self.hidden
        block: torch.Tensor,  # [w, d]
        bias: torch.Tensor | None,  # [w]
        out: torch.Tensor,  # [n, w]
    ) -> torch.Tensor:
        """Logits in units of log 2, or the tanh of capped ones."""
        multiply(hidden, block.T, out)
        if not self.prescaled:
            out.mul_(self.inner)
        if bias is not None:
            out.add_(bias.to(self.accumulate), alpha=self.inner)
        return out.tanh_() if self.softcap else out

    def shifted(self, logits: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """``x - m`` [n, w] from what :meth:`logits` gave, in its place if it can be lost."""
        out = self.second[: logits.numel()].view_as(logits) if self.second.numel() else logits
        return torch.add(-m[:, None], logits, alpha=self.outer, out=out)


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
    inner, outer = scales(settings)
    return _Tiles(
        compute=compute,
        accumulate=accumulate,
        softcap=capped,
        inner=inner,
        outer=outer,
        prescaled=compute == accumulate,
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
    # the lowest finite number, so that a block of -inf alone gives exp(-inf - m) = 0
    m = out.l.new_full((num,), torch.finfo(tiles.accumulate).min)
    l, weighted, picked = (torch.zeros_like(m) for _ in range(3))
    acc = torch.zeros_like(tile, dtype=tiles.accumulate) if jacobian else None
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

        above = torch.maximum(m, logits.amax(1).mul_(tiles.outer))
        lowered = m - above
        rescale = lowered.exp2()
        m = above
        x = tiles.shifted(logits, m)
        e = x.exp2() if settings.entropy else x.exp2_()
        if settings.entropy:
            # sum e (x - m), moved along with m; clamped because -inf * 0 is NaN
            here = x.clamp_(min=torch.finfo(x.dtype).min).mul_(e).sum(1)
            weighted = torch.addcmul(here, rescale, torch.addcmul(weighted, l, lowered))
        l = torch.addcmul(e.sum(1), l, rescale)
        if acc is not None:
            if tiles.softcap:
                e.mul_(slope(logits))
            addmm(acc.mul_(rescale[:, None]), e, block)

    own = OnlineSoftmax(m, l, weighted if settings.entropy else None, picked * tiles.outer, acc)
    found = merge(own, settings)
    picked_slope = slope(picked) if tiles.softcap else None
    write_results(out, rows, weight, target, picked_slope, found, settings)


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

    Rows whose incoming gradient is zero are skipped.
    """
    stored = forward.logits.shape[0] > 0
    if stored:
        rows = (targets >= 0).nonzero()[:, 0]
    else:
        rows = live_rows(targets, grad_log_prob, grad_entropy)
    tiles = _tiles(hidden, weight, rows.numel(), settings, stored)

    def grad_logits(
        states: torch.Tensor, block: torch.Tensor, start: int, tile: Rows, first: int
    ) -> torch.Tensor:
        num, columns = states.shape[0], block.shape[0]
        if stored:
            logits = forward.logits[first : first + num]
        else:
            part = None if bias is None else bias[start : start + columns]
            into = tiles.first[: num * columns].view(num, columns)
            logits = tiles.logits(tiles.hidden(states), block, part, into)
        local = targets[tile] - start
        return _grad_logits(tiles, logits, local, tile, forward, grad_log_prob, grad_entropy)

    return block_gradients(
        hidden,
        weight,
        bias,
        rows,
        tiles.width,
        ROW_TILE,
        needed,
        settings,
        grad_logits,
        sum_over_shards,
    )


def _grad_logits(
    tiles: _Tiles,
    logits: torch.Tensor,  # [n, w]
    local: torch.Tensor,  # [n], column of the target, perhaps outside
    rows: Rows,  # [n]
    forward: HeadForward,
    grad_log_prob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of the uncapped logits times the temperature, [n, w]."""
    l = forward.l[rows]
    x = tiles.shifted(logits, forward.m[rows])
    if grad_entropy is None:
        assert grad_log_prob is not None  # ``LinearLogProb.backward`` returns where both are None
        dz = x.exp2_().mul_((-grad_log_prob[rows] / l)[:, None])
    else:
        # -p (g_entropy (log p + entropy) + g_log_prob)
        dz = x.exp2().mul_(-(1 / l)[:, None])
        scale = x.clamp_(min=torch.finfo(x.dtype).min).sub_(l.log2()[:, None]).div_(LOG2_E)
        scale.add_(forward.entropy[rows, None]).mul_(grad_entropy[rows, None])
        if grad_log_prob is not None:
            scale.add_(grad_log_prob[rows, None])
        dz.mul_(scale)
    if grad_log_prob is not None:
        inside = (local >= 0) & (local < dz.shape[1])
        one = torch.where(inside, grad_log_prob[rows], 0.0).to(dz.dtype)
        dz.scatter_add_(1, local.clamp(0, dz.shape[1] - 1)[:, None], one[:, None])
    return dz.mul_(slope(logits)) if tiles.softcap else dz

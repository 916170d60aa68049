"""Inputs of the kernels' rows, their exact answers, and what may differ from them.

Everything is drawn on the device, from a seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from harness import Wrong, require

from r2ec_kernels import linear_logprob

CHECKED = 512  # tokens compared with float64
QUERIES = 4  # of a large table, compared with float64
COPIES = 4  # batches of queries that take turns
_BLOCK = 1 << 16  # items of a float64 block


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tables(
    device: str, count: int, dim: int, batch: int, dtype: torch.dtype, copies: int = COPIES
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Items [N, d] and ``copies`` batches of queries [B, d], as of a model that has learned."""
    generator = torch.Generator(device).manual_seed(count + dim + batch)
    items = torch.randn(count, dim, generator=generator, device=device).to(dtype)
    chosen = torch.randint(0, count, (copies, batch), generator=generator, device=device)
    noise = torch.randn(copies, batch, dim, generator=generator, device=device)
    return items, list((0.2 * items[chosen].float() + noise).to(dtype))


def draw(device: str, high: int, *shape: int, seed: int = 1) -> torch.Tensor:
    """Integers below ``high``, int64."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator, device=device)


def exact_scores(
    queries: torch.Tensor, items: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """float32 [B, N]: dot products in float64 over the temperature, rounded once. Those that a
    float64 sum in another order rounds to another number are one in 10^8."""
    rows = queries.double()
    blocks = [rows @ block.double().T for block in items.split(_BLOCK)]
    return (torch.cat(blocks, 1) / temperature).float()


def require_best(found: tuple, scores: torch.Tensor, k: int) -> None:
    """Raises `Wrong` unless the first rows of ``found`` are the k best of ``scores`` [b, N]."""
    right = scores.sort(dim=1, descending=True, stable=True)
    require_equal(found, (right.values[:, :k], right.indices[:, :k]))


def require_equal(found: tuple, right: tuple) -> None:
    """Raises `Wrong` unless the first rows of ``found`` (scores, ids) are ``right``."""
    part = slice(0, len(right[0]))
    if not torch.equal(found[1][part], right[1]):
        raise Wrong("other items than float64 scores give")
    if not torch.equal(found[0][part], right[0]):
        raise Wrong("scores differ from float64 scores, rounded once")


def require_stats(found: tuple, rank: torch.Tensor, log_prob: torch.Tensor) -> float:
    """The largest error of a log-probability; raises `Wrong` above 1e-3 and for another rank."""
    part = slice(0, len(rank))
    if not torch.equal(found[0][part], rank):
        raise Wrong("ranks differ from float64")
    error = float((found[1][part] - log_prob).abs().max())
    return require(error, 1e-3, "log-probability")


def exact_stats(scores: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank and log-probability of the targets among ``scores`` [b, N]."""
    own = scores.gather(1, targets[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < targets[:, None]
    rank = 1 + ((scores > own) | ((scores == own) & before)).sum(1)
    log_prob = own[:, 0].double() - scores.double().logsumexp(1)
    return rank, log_prob.float()


@dataclass(frozen=True)
class HeadShape:
    """A language-model head: T tokens, V words, d columns, and what is asked of it."""

    tokens: int
    vocab: int
    dim: int
    dtype: torch.dtype
    frozen: bool = True
    softcap: float | None = None
    extras: bool = False  # a bias, and the entropies with their gradient

    @property
    def label(self) -> str:
        parts = [f"linear_logprob {'frozen' if self.frozen else 'trainable'} head"]
        parts += ["soft-cap"] if self.softcap else []
        parts += ["bias and entropy"] if self.extras else []
        return " ".join([*parts, name_of(self.dtype)])

    @property
    def size(self) -> dict[str, int | float | str]:
        return {"T": self.tokens, "V": self.vocab, "d": self.dim}


class Head:
    """Inputs of a head and a step through it: log-probabilities, entropies, gradients."""

    def __init__(self, device: str, shape: HeadShape) -> None:
        generator = torch.Generator(device).manual_seed(3)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        self.shape = shape
        self.hidden = randn(shape.tokens, shape.dim).to(shape.dtype)
        self.weight = (randn(shape.vocab, shape.dim) / shape.dim**0.5).to(shape.dtype)
        self.bias = randn(shape.vocab).to(shape.dtype) if shape.extras else None
        self.targets = draw(device, shape.vocab, shape.tokens, seed=4)
        self.targets[3::5] = -100
        self.scale = torch.rand(shape.tokens, generator=generator, device=device) + 0.5

    def step(self, function: Callable, rows: int, kind: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Results and gradients of the first ``rows`` tokens, in the type ``kind``."""
        trains = not self.shape.frozen
        hidden = self.hidden[:rows].to(kind).requires_grad_()
        weight = self.weight.to(kind).requires_grad_(trains)
        bias = None if self.bias is None else self.bias.to(kind).requires_grad_(trains)
        results = function(hidden, weight, bias, self.targets[:rows])
        objective = sum((result * self.scale[:rows].to(result)).sum() for result in results)
        leaves = [hidden, weight, bias] if trains else [hidden]
        gradients = torch.autograd.grad(objective, [leaf for leaf in leaves if leaf is not None])
        return *(result.detach() for result in results), *gradients

    def triton(self, h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor):
        from r2ec_kernels.logprob.impl import triton as logprob_triton

        # the kernel of narrow heads takes 16-bit types, which the interpreter gets as float32
        types = (torch.float32,) if interpreted() else logprob_triton.FUSED_TYPES
        with mock.patch.object(logprob_triton, "FUSED_TYPES", types):
            how = {"bias": b, "softcap": self.shape.softcap, "entropy": self.shape.extras}
            out = linear_logprob(h, w, y, impl="triton", **how)
        return [value for value in out if value is not None]

    def plain(self, h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor):
        logits = (h @ w.T).to(torch.promote_types(h.dtype, torch.float32))
        if b is not None:
            logits = logits + b
        if self.shape.softcap is not None:
            logits = self.shape.softcap * torch.tanh(logits / self.shape.softcap)
        log_p, counted = logits.log_softmax(-1), y >= 0
        picked = log_p.gather(1, y.clamp(min=0)[:, None])[:, 0]
        results = [picked * counted]
        if self.shape.extras:
            results.append(-(log_p.exp() * log_p).sum(-1) * counted)
        return results

    @property
    def names(self) -> list[str]:
        """What a step returns, in words."""
        extras, trains = self.shape.extras, not self.shape.frozen
        leaves = ["hidden"] + ["weight"] * trains + ["bias"] * (trains and extras)
        gradients = [f"gradient of {leaf}" for leaf in leaves]
        return ["log-probability", *["entropy"] * extras, *gradients]

    def run_triton(self) -> tuple[torch.Tensor, ...]:
        return self.step(self.triton, self.shape.tokens, self.shape.dtype)

    def run_plain(self) -> tuple[torch.Tensor, ...]:
        return self.step(self.plain, self.shape.tokens, self.shape.dtype)

    def check(self, found: tuple[torch.Tensor, ...]) -> float:
        """The largest error against float64, over the largest number. Allowed: twice that of plain
        torch in the same type, and a rounding unit."""
        shape, rows = self.shape, min(CHECKED, self.shape.tokens)
        if rows < shape.tokens and not shape.frozen:  # the head's gradient sums over the tokens
            found = self.step(self.triton, rows, shape.dtype)
        usual, right = (self.step(self.plain, rows, kind) for kind in (shape.dtype, torch.float64))
        # the interpreter's exp2, and tanh by exp2, round once more than the device's
        times, worst = 3 if interpreted() else 2, 0.0
        for what, ours, plain, exact in zip(self.names, found, usual, right, strict=True):
            ours = ours[: len(exact)]
            size = exact.abs().max()
            error, allowed = (ours - exact).abs().max(), (plain - exact).abs().max()
            limit = times * allowed + 2 * torch.finfo(ours.dtype).eps * size
            if not error <= limit:
                raise Wrong(f"{what}: error {error:.2g}, allowed {limit:.2g}")
            worst = max(worst, float(error / size))
        return worst

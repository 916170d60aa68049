"""Every Triton kernel at work: launched, checked against float64 on random inputs, and timed.

Rows stand in the order of their value: one of each kernel first, then other types and batches. With
``tiny`` sizes they run under Triton's interpreter (float32; bfloat16 products are wrong there).
The budget of an error is twice that of the plain torch expression in the same type, plus one
rounding unit (three times in the interpreter).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from harness import Case, Entry, Wrong, rotating

from r2ec_kernels import ItemIndex, item_topk, linear_logprob, reward_and_advantage, target_stats

SUITE = "kernels"
CHECKED = 64  # rows compared with float64
COPIES = 4  # batches of queries that take turns


def entries(device: str, *, tiny: bool) -> Iterator[Entry]:
    """One entry a kernel, type and batch; methods: the Triton kernel and plain torch."""
    half = torch.float32 if tiny else torch.bfloat16
    large, middle = (700, 400) if tiny else (1_000_000, 200_000)
    vocab, tokens = (500, 20) if tiny else (152_064, 4096)
    wide = 136 if tiny else 1024  # a narrow head has a kernel of its own
    yield _topk(device, large, 40 if tiny else 256, 5 if tiny else 16, half)
    yield _head(device, tokens, vocab, wide, half, frozen=True)
    yield _index(device, large, 40 if tiny else 256, 5 if tiny else 16, "int8")
    yield _stats(device, large, 40 if tiny else 256, 5 if tiny else 64, half)
    yield _head(device, 5 if tiny else 256, large, 24 if tiny else 64, half, frozen=True)
    yield _head(device, tokens, vocab, wide, half, frozen=False)
    yield _rewards(device, 7 if tiny else 4096, 5 if tiny else 8)
    yield _index(device, middle, wide, 5 if tiny else 64, "bf16")
    yield _head(device, tokens, vocab, wide, half, frozen=True, softcap=30.0)
    dtypes = (torch.float32,) if tiny else (torch.bfloat16, torch.float32, torch.float16)
    for dtype in dtypes:
        for batch in (1, 3) if tiny else (1, 64, 1024):
            yield _topk(device, middle, wide, batch, dtype, excluded=20)
            yield _stats(device, middle, wide, batch, dtype)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tables(
    device: str, count: int, dim: int, batch: int, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(count + dim + batch)
    items = torch.randn(count, dim, generator=generator, device=device).to(dtype)
    chosen = torch.randint(0, count, (COPIES, batch), generator=generator, device=device)
    noise = torch.randn(COPIES, batch, dim, generator=generator, device=device)
    queries = (0.2 * items[chosen].float() + noise).to(dtype)  # a model that has learned something
    return items, list(queries)


def _same_top(found: tuple, queries: torch.Tensor, items: torch.Tensor, k: int, exclude) -> None:
    part = slice(0, min(CHECKED, len(queries)))
    excluded = None if exclude is None else exclude[part]
    right = item_topk(queries[part], items, k, exclude=excluded, impl="reference")
    if not torch.equal(found[1][part], right.indices):
        raise Wrong("other items than float64 scores give")
    if not torch.equal(found[0][part], right.scores):
        raise Wrong("scores differ from float64 scores, rounded once")


def _topk(
    device: str, count: int, dim: int, batch: int, dtype: torch.dtype, excluded: int = 0
) -> Entry:
    k = 5 if count < 1000 else 100
    shape = {"N": count, "d": dim, "B": batch, "k": k, "excluded": excluded}
    # the table once, the queries and the result; one product
    moved, flops = count * dim * dtype.itemsize, 2.0 * batch * count * dim

    def build() -> list[Case]:
        items, queries = _tables(device, count, dim, batch, dtype)
        exclude = None
        if excluded:
            generator = torch.Generator(device).manual_seed(1)
            exclude = torch.randint(0, count, (batch, excluded), generator=generator, device=device)

        def triton(q: torch.Tensor) -> tuple:
            return item_topk(q, items, k, exclude=exclude, impl="triton")

        def plain(q: torch.Tensor) -> tuple:
            scores = q @ items.T
            if exclude is not None:
                scores.scatter_(1, exclude, -torch.inf)
            return scores.topk(k, dim=1)

        def exact(found: tuple) -> float:
            _same_top(found, queries[0], items, k, exclude)
            return 0.0

        return [
            Case("triton", rotating(triton, queries), exact, moved, flops, batch, "queries"),
            Case("torch", rotating(plain, queries), lambda _: None, moved, flops, batch, "queries"),
        ]

    op = f"item_topk {_name(dtype)}"
    return Entry(SUITE, op, shape, ("triton", "torch"), build, versus="torch")


def _index(device: str, count: int, dim: int, batch: int, scan: str) -> Entry:
    k = 5 if count < 1000 else 100
    shape = {"N": count, "d": dim, "B": batch, "k": k}
    moved = count * dim * (1 if scan == "int8" else 2)
    flops = 2.0 * batch * count * dim

    def build() -> list[Case]:
        items, queries = _tables(device, count, dim, batch, torch.float32)
        index = ItemIndex(items, scan=scan)

        def exact(found: tuple) -> float:
            _same_top(found, queries[0], items, k, None)
            if not index.last_search.scan.startswith("triton"):
                raise Wrong(f"searched by {index.last_search.scan!r}, not by the kernel")
            return 0.0

        def search(q: torch.Tensor) -> tuple:
            return index.search(q, k)

        def plain(q: torch.Tensor) -> tuple:
            return (q @ items.T).topk(k, dim=1)

        return [
            Case("triton", rotating(search, queries), exact, moved, flops, batch, "queries"),
            Case("torch", rotating(plain, queries), lambda _: None, None, flops, batch, "queries"),
        ]

    op = f"ItemIndex.search {scan} of float32"
    return Entry(SUITE, op, shape, ("triton", "torch"), build, versus="torch")


def _stats(device: str, count: int, dim: int, batch: int, dtype: torch.dtype) -> Entry:
    shape = {"N": count, "d": dim, "B": batch}
    moved, flops = count * dim * dtype.itemsize, 2.0 * batch * count * dim

    def build() -> list[Case]:
        items, queries = _tables(device, count, dim, batch, dtype)
        generator = torch.Generator(device).manual_seed(2)
        targets = torch.randint(0, count, (batch,), generator=generator, device=device)

        def triton(q: torch.Tensor) -> tuple:
            return target_stats(q, items, targets, temperature=4.0, impl="triton")

        def plain(q: torch.Tensor) -> tuple:
            scores = (q @ items.T).float() / 4.0
            own = scores.gather(1, targets[:, None])
            return 1 + (scores > own).sum(1), own[:, 0] - scores.logsumexp(1)

        def exact(found: tuple) -> float:
            part = slice(0, min(CHECKED, batch))
            right = target_stats(
                queries[0][part], items, targets[part], temperature=4.0, impl="reference"
            )
            if not torch.equal(found[0][part], right.rank):
                raise Wrong("ranks differ from float64")
            error = float((found[1][part] - right.log_prob).abs().max())
            if not error <= 1e-3:
                raise Wrong(f"log-probabilities off by {error:.2g}, allowed 1e-3")
            return error

        return [
            Case("triton", rotating(triton, queries), exact, moved, flops, batch, "queries"),
            Case("torch", rotating(plain, queries), lambda _: None, moved, flops, batch, "queries"),
        ]

    op = f"target_stats {_name(dtype)}"
    return Entry(SUITE, op, shape, ("triton", "torch"), build, versus="torch")


def _head(
    device: str,
    tokens: int,
    vocab: int,
    dim: int,
    dtype: torch.dtype,
    *,
    frozen: bool,
    softcap: float | None = None,
) -> Entry:
    shape = {"T": tokens, "V": vocab, "d": dim}
    # frozen: two products; trainable: logits once more and two gradients. The head once a product.
    products = 2 if frozen else 4
    flops = products * 2.0 * tokens * vocab * dim
    moved = float(products * vocab * dim * dtype.itemsize)

    def build() -> list[Case]:
        from r2ec_kernels.logprob.impl import triton as logprob_triton

        generator = torch.Generator(device).manual_seed(3)
        hidden = torch.randn(tokens, dim, generator=generator, device=device).to(dtype)
        weight = torch.randn(vocab, dim, generator=generator, device=device) / dim**0.5
        weight = weight.to(dtype)
        targets = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
        scale = torch.rand(tokens, generator=generator, device=device) + 0.5

        def run(function: Callable, rows: int, kind: torch.dtype) -> tuple[torch.Tensor, ...]:
            h = hidden[:rows].to(kind).requires_grad_()
            w = weight.to(kind).requires_grad_(not frozen)
            log_prob = function(h, w, targets[:rows])
            leaves = [h] if frozen else [h, w]
            return log_prob.detach(), *torch.autograd.grad(log_prob, leaves, scale[:rows].to(kind))

        def triton(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            # the kernel of narrow heads takes 16-bit types, which the interpreter gets as float32
            types = (torch.float32,) if _interpreted() else logprob_triton.FUSED_TYPES
            with mock.patch.object(logprob_triton, "FUSED_TYPES", types):
                return linear_logprob(h, w, y, softcap=softcap, impl="triton").log_prob

        def plain(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            logits = (h @ w.T).to(torch.promote_types(h.dtype, torch.float32))
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            return logits.log_softmax(-1).gather(1, y[:, None])[:, 0]

        def checked(_: tuple) -> float:
            rows = min(CHECKED, tokens)
            right = run(plain, rows, torch.float64)
            worst = 0.0
            for ours, usual, exact in zip(
                run(triton, rows, dtype), run(plain, rows, dtype), right, strict=True
            ):
                size = exact.abs().max()
                error, allowed = (ours - exact).abs().max(), (usual - exact).abs().max()
                # the interpreter's exp2, and tanh by exp2, round once more than the device's
                times = 3 if _interpreted() else 2
                limit = times * allowed + 2 * torch.finfo(ours.dtype).eps * size
                if not error <= limit:
                    raise Wrong(f"error {error:.2g}, allowed {limit:.2g}")
                worst = max(worst, float(error / size))
            return worst

        numbers = (moved, flops, tokens, "tokens")
        return [
            Case("triton", lambda: run(triton, tokens, dtype), checked, *numbers),
            Case("torch", lambda: run(plain, tokens, dtype), lambda _: None, *numbers),
        ]

    kind = f"{'frozen' if frozen else 'trainable'} head" + (" soft-cap" if softcap else "")
    op = f"linear_logprob {kind} {_name(dtype)}"
    return Entry(SUITE, op, shape, ("triton", "torch"), build, versus="torch")


def _rewards(device: str, groups: int, size: int) -> Entry:
    shape = {"B": groups, "G": size}
    moved = groups * size * (8 + 4 + 4 + 4 + 1)  # rank, log_prob; reward, advantage, best

    def build() -> list[Case]:
        generator = torch.Generator(device).manual_seed(4)
        rank = torch.randint(1, 1500, (groups, size), generator=generator, device=device)
        log_prob = -5 * torch.rand(groups, size, generator=generator, device=device)

        def run(impl: str, logs: torch.Tensor) -> tuple:
            return reward_and_advantage(rank, logs, impl=impl)

        def checked(found: tuple) -> float:
            right = run("torch", log_prob.double())
            error = float((found[1] - right[1]).abs().max())
            if not error <= 1e-4 or not torch.equal(found[2], right[2]):
                raise Wrong(f"advantages off by {error:.2g}, allowed 1e-4, or another best one")
            return error

        return [
            Case("triton", lambda: run("triton", log_prob), checked, moved, None, groups, "users"),
            Case("torch", lambda: run("torch", log_prob), checked, moved, None, groups, "users"),
        ]

    op = "reward_and_advantage float32"
    return Entry(SUITE, op, shape, ("triton", "torch"), build, versus="torch")

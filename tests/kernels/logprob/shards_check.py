"""One rank of the tests of a divided vocabulary: rank, ranks, store file, implementation."""

import dataclasses
import datetime
import sys

import torch
import torch.distributed as dist
from _support.loss_cases import BASE, NAMES, call, gradients, make

from r2ec_kernels import linear_logprob

VOCAB = 41


def edges(ranks: int) -> list[int]:
    """Uneven shards; with three, no target is in the last."""
    return [0, 29, VOCAB] if ranks == 2 else [0, 3, 37, VOCAB]


def case(ranks: int, dtype: torch.dtype):
    """(arguments of a loss, what is stored, bias); targets below 37."""
    found, stored, _ = make(vocab=VOCAB, dtype=dtype)
    found["targets"] %= 37
    found["targets"][4::7] = -100
    if ranks == 1:
        found["targets"][0] = VOCAB - 1
    generator = torch.Generator().manual_seed(3)
    return found, stored, torch.randn(VOCAB, generator=generator, dtype=dtype)


def close(ours: torch.Tensor | None, whole: torch.Tensor | None) -> None:
    if whole is None:
        assert ours is None
        return
    wide = whole.dtype == torch.float64
    bounds = {"rtol": 1e-10, "atol": 1e-12} if wide else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(ours, whole, **bounds)


def check_head(group, first, last, ranks, dtype, impl, trainable, softcap) -> None:
    found, _, bias = case(ranks, dtype)
    names = ("hidden", "weight", "bias") if trainable else ("hidden",)
    results = []
    for rows in (slice(0, VOCAB), slice(first, last)):
        leaves = {
            "hidden": found["hidden"].detach().clone(),
            "weight": found["weight"][rows].clone(),
            "bias": bias[rows].clone(),
        }
        for name in names:
            leaves[name].requires_grad_()
        shard = {"group": group, "first_token": first} if rows.start or rows.stop != VOCAB else {}
        if ranks == 1:
            shard = {"group": group, "first_token": 0} if results else {}
        out = linear_logprob(
            leaves["hidden"],
            leaves["weight"],
            found["targets"],
            bias=leaves["bias"],
            softcap=softcap,
            temperature=1.3,
            entropy=True,
            impl=impl,
            **shard,
        )
        for entropy_too in (False, True):
            value = (out.log_prob * torch.arange(len(out.log_prob))).sum()
            value = value + (out.entropy.square().sum() if entropy_too else 0)
            wanted = [leaves[name] for name in names]
            grads = torch.autograd.grad(value, wanted, retain_graph=True)
            results.append([out.log_prob.detach(), out.entropy.detach(), *grads])
    for whole, ours in zip(results[:2], results[2:], strict=True):
        for name, a, b in zip(("log_prob", "entropy", *names), ours, whole, strict=True):
            close(a, b[first:last] if name in ("weight", "bias") else b)


def check_loss(group, first, last, ranks, dtype, impl, config) -> None:
    results = []
    for rows in (slice(0, VOCAB), slice(first, last)):
        found, stored, bias = case(ranks, dtype)
        shard = {"group": group, "first_token": first} if results else {}
        found["weight"] = found["weight"][rows]
        settings = dataclasses.replace(config, impl=impl)
        loss = call(found, settings, **stored, bias=bias[rows], **shard)
        results.append((loss, gradients(found, loss, NAMES)))
    (whole, grads), (ours, our_grads) = results
    for a, b in zip((*ours, *our_grads), (*whole, *grads), strict=True):
        close(a, b)


def main(rank: int, ranks: int, store: str, impl: str) -> int:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    group = dist.group.WORLD
    first, last = (0, VOCAB) if ranks == 1 else edges(ranks)[rank : rank + 2]
    for dtype in (torch.float32,) if impl == "triton" else (torch.float64, torch.float32):
        for trainable in (False, True):
            for softcap in (None, 3.0):
                check_head(group, first, last, ranks, dtype, impl, trainable, softcap)
        for config in (
            dataclasses.replace(BASE, entropy=True, softcap=3.0),
            dataclasses.replace(BASE, kl_weight=0.1, ratio_level="sequence", entropy=True),
        ):
            check_loss(group, first, last, ranks, dtype, impl, config)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]))

"""Tables, queries and an oracle for the search tests."""

from dataclasses import dataclass

import numpy as np
import torch

SIMILARITIES = ("dot", "cosine", "l2")
GRID = 2.0**10


def canonical(queries: torch.Tensor, items: torch.Tensor, similarity: str, temperature: float):
    """float32 [B, N] in numpy, straight from the definition."""
    q = queries.double().numpy()
    x = items.double().numpy()
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if similarity == "l2":
            value = -np.sqrt(((q[:, None] - x[None]) ** 2).sum(-1))
        else:
            value = (q[:, None] * x[None]).sum(-1)
            if similarity == "cosine":
                scale = np.sqrt((q**2).sum(-1))[:, None] * np.sqrt((x**2).sum(-1))[None]
                value = np.where(scale == 0, 0.0, value / np.where(scale == 0, 1.0, scale))
        return torch.from_numpy((value / temperature).astype(np.float32)) + 0.0


def sorted_topk(scores: torch.Tensor, k: int, excluded: list[set[int]] | None = None):
    """Top-k of scores [B, N] by a stable Python sort; padded with (-inf, -1)."""
    batch, count = scores.shape
    top = torch.full((batch, k), float("-inf"))
    ids = torch.full((batch, k), -1, dtype=torch.int64)
    for b in range(batch):
        hidden = excluded[b] if excluded else set()
        kept = [i for i in range(count) if i not in hidden]
        row = scores[b].tolist()
        best = sorted(kept, key=lambda i: -row[i])[:k]
        top[b, : len(best)] = scores[b][best]
        ids[b, : len(best)] = torch.tensor(best, dtype=torch.int64)
    return top, ids


@dataclass(frozen=True)
class Problem:
    queries: torch.Tensor
    items: torch.Tensor


def _grid(x: torch.Tensor) -> torch.Tensor:
    """Multiples of 1 / GRID: more bits than bfloat16 or int8 hold, few enough for float64 sums
    that are exact in any order, so that the oracle does not depend on numpy's order."""
    return (x * GRID).round() / GRID


def _mean(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return x + _grid(20 * torch.randn(x.shape[1], generator=generator))


def _scales(x: torch.Tensor, generator: torch.Generator, low: int, high: int) -> torch.Tensor:
    return x * torch.exp2(torch.randint(low, high + 1, (x.shape[0], 1), generator=generator))


def _copies(x: torch.Tensor, generator: torch.Generator, share: float) -> torch.Tensor:
    distinct = max(1, int(x.shape[0] * (1 - share)))
    return x[torch.randint(0, distinct, (x.shape[0],), generator=generator)]


def _sorted(q: torch.Tensor, x: torch.Tensor, descending: bool) -> torch.Tensor:
    if not q.shape[0]:
        return x
    return x[torch.argsort(x @ q[0], descending=descending)]


KINDS = {
    "normal": lambda q, x, g: x,
    "all equal": lambda q, x, g: x[:1].expand_as(x).clone(),
    "90% copies": lambda q, x, g: _copies(x, g, 0.9),
    "small integers": lambda q, x, g: (x * 1.5).round(),
    "ascending": lambda q, x, g: _sorted(q, x, descending=False),
    "descending": lambda q, x, g: _sorted(q, x, descending=True),
    "shared mean": lambda q, x, g: _mean(x, g),
    "row scales": lambda q, x, g: _scales(x, g, -10, 10),
    "zero rows": lambda q, x, g: x * (torch.rand(x.shape[0], 1, generator=g) > 0.5),
    "near ties": lambda q, x, g: x[:1] + (3 * x).round() / GRID,
    "denormal": lambda q, x, g: x * 2.0**-135,
    "huge": lambda q, x, g: x * 2.0**100,
    "wild scales": lambda q, x, g: _scales(x, g, -130, 110),
    "one outlier column": lambda q, x, g: torch.cat([x[:, :1] * 2.0**13, x[:, 1:]], 1),
    "one hot": lambda q, x, g: torch.nn.functional.one_hot(
        torch.randint(0, x.shape[1], (x.shape[0],), generator=g), x.shape[1]
    ).float(),
}


def make(kind: str, batch: int, count: int, dim: int, seed: int, dtype=torch.float32) -> Problem:
    """A seeded problem of one kind."""
    generator = torch.Generator().manual_seed(seed)
    queries = _grid(torch.randn(batch, dim, generator=generator))
    items = KINDS[kind](queries, _grid(torch.randn(count, dim, generator=generator)), generator)
    if dtype == torch.float16:
        items = items.clamp(-6e4, 6e4)
    return Problem(queries.to(dtype), items.to(dtype))


def make_exclude(batch: int, count: int, width: int, seed: int) -> torch.Tensor:
    """Padded ids [B, width] with -1 in random places and repeats."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, max(count, 1), (batch, width), generator=generator)


def as_sets(exclude: torch.Tensor) -> list[set[int]]:
    return [set(row) - {-1} for row in exclude.tolist()]


def assert_same(got, want):
    """Two results (scores, ids), bit for bit."""
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0], want[0])


INCLUDE_FORMS = ("ids", "array", "list", "mask", "mask array")


def make_include(count: int, size: int, form: str, seed: int):
    """An allow-list of about ``size`` of ``count`` ids in one of INCLUDE_FORMS, and its set. Ids
    are in any order, some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(count, generator=generator)[:size]
    named = set(ids.tolist())
    if form.startswith("mask"):
        mask = torch.zeros(count, dtype=torch.bool)
        mask[ids] = True
        return mask if form == "mask" else mask.numpy(), named
    ids = torch.cat([ids, ids[: size // 3]])
    return {"ids": ids, "array": ids.numpy(), "list": ids.tolist()}[form], named


def without(included: set[int], count: int, excluded: list[set[int]]) -> list[set[int]]:
    """What an allow-list and exclusions hide from each query, as exclusions."""
    return [(set(range(count)) - included) | hidden for hidden in excluded]

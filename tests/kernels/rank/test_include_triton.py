"""Allow-lists of target_stats by its Triton kernels: on a GPU and in Triton's interpreter."""

import contextlib

import pytest
import torch
from _support.search_cases import SIMILARITIES, make, make_exclude, make_include

from r2ec_kernels import ItemIndex, target_stats
from r2ec_kernels._block_sizes import block_sizes

DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("normal", "90% copies", "near ties", "row scales", "zero rows")


def small_blocks(device):
    """In the interpreter: several tiles a split of the items, several splits."""
    if device == "cuda":
        return contextlib.nullcontext()
    from r2ec_kernels.rank.impl import triton as implementation

    return block_sizes(implementation, BLOCK_ITEMS=32, BLOCK_QUERIES=16, PROGRAMS=3)


def problem_of(kind, count, size, dtype=torch.float32):
    """(queries, items, targets, exclude, include): some targets included, some excluded."""
    problem = make(kind, 5, count, 20, size, dtype)
    form = ("ids", "mask", "list")[size % 3]
    include, named = make_include(count, size, form, size)
    targets = torch.arange(5) * (count // 5)
    if named:
        targets[0], targets[1] = min(named), max(named)
    exclude = make_exclude(5, count, 9, size)
    exclude[1:3, 0] = targets[1:3]
    return problem.queries, problem.items, targets, exclude, include


def assert_close(got, want):
    assert torch.equal(got.rank.cpu(), want.rank)
    torch.testing.assert_close(got.log_prob.cpu(), want.log_prob, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("number", range(15))
def test_ranks_are_exact(number, device):
    kind, similarity = KINDS[number % 5], SIMILARITIES[number % 3]
    size = (0, 1, 30, 90)[number % 4]
    queries, items, targets, exclude, include = problem_of(kind, 90, size, DTYPES[number % 2])
    how = {"similarity": similarity, "temperature": 0.5, "include": include}
    want = target_stats(queries, items, targets, exclude=exclude, impl="reference", **how)
    there = [x.to(device) for x in (queries, items, targets)]
    with small_blocks(device):
        got = target_stats(*there, exclude=exclude.to(device), impl="triton", **how)
    assert_close(got, want)


@pytest.mark.parametrize("size", [1, 60, 150])
def test_an_index(size, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setenv("R2EC_IMPL", "triton")
    queries, items, targets, exclude, include = problem_of("normal", 150, size)
    how = {"similarity": "cosine", "temperature": 0.5}
    index = ItemIndex(items.to(device), scan="none", **how)
    gone = torch.tensor([i for i in range(0, 150, 5) if i not in targets.tolist()])
    index.remove(gone.to(device))
    got = index.target_stats(
        queries.to(device), targets.to(device), exclude=exclude.to(device), include=include
    )
    hidden = torch.cat([exclude, gone.expand(5, -1)], 1)
    how |= {"exclude": hidden, "include": include, "impl": "reference"}
    assert_close(got, target_stats(queries, items, targets, **how))

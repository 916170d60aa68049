"""Allow-lists of target_stats by its Triton kernels: on a GPU and in Triton's interpreter."""

import contextlib

import pytest
import torch
from _support import search_cases
from _support.search_cases import (
    INCLUDE_FORMS,
    SIMILARITIES,
    make,
    make_exclude,
    make_include,
)

from r2ec_kernels import ItemIndex, target_stats
from r2ec_kernels._block_sizes import block_sizes

DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("normal", "90% copies", "near ties", "row scales", "zero rows")
EVERY_KIND = sorted(set(search_cases.KINDS) - {"huge", "wild scales"})
PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 20))]
CASES = 25  # of a part


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


@pytest.mark.parametrize("through", ["target_stats", "an index"])
@pytest.mark.parametrize("part", PARTS)
def test_many_small_cases(part, through, device, monkeypatch):
    """Of rows and of an index, 20 parts x 25: 1,000 comparisons."""
    if device == "cpu":
        monkeypatch.setenv("R2EC_IMPL", "triton")
    for number in range(part * CASES, part * CASES + CASES):
        queries, items, targets, exclude, include = small_case(number, device)
        how = {"similarity": SIMILARITIES[number // 2 % 3], "temperature": 2.0}
        ours = {"exclude": exclude, "include": include}
        want = target_stats(queries, items, targets, impl="reference", **how, **ours)
        ours = {name: x.to(device) if torch.is_tensor(x) else x for name, x in ours.items()}
        queries, items, targets = (x.to(device) for x in (queries, items, targets))
        with small_blocks(device):
            if through == "an index":
                scan = ("none", "bf16", "int8")[number % 3]
                index = ItemIndex(items, scan=scan, **how)
                got = index.target_stats(queries, targets, **ours)
            else:
                got = target_stats(queries, items, targets, impl="triton", **how, **ours)
        assert torch.equal(got.rank.cpu(), want.rank), f"case {number}"
        assert torch.allclose(got.log_prob.cpu(), want.log_prob, 1e-5, 1e-3), f"case {number}"


def small_case(number, device):
    """(queries, items, targets, exclude, include) of any kind, form and size."""
    count, batch = (33, 64, 90, 129)[number % 4], 1 + number % 3
    kind, dtype = EVERY_KIND[number % len(EVERY_KIND)], DTYPES[number // 2 % 2]
    if device == "cpu" and kind == "denormal":
        dtype = torch.float32  # the interpreter widens bfloat16's wrongly
    problem = make(kind, batch, count, (8, 20)[number % 2], number, dtype)
    size = (0, 1, count // 12, count // 2, count - 1, count)[number % 6]
    form = INCLUDE_FORMS[number // 3 % len(INCLUDE_FORMS)]
    include, _ = make_include(count, size, form, number)
    exclude = make_exclude(batch, count, count // 9, number)
    targets = torch.arange(batch) * (count // 3) + number % 7
    exclude[0, 0] = targets[0]
    return problem.queries, problem.items, targets, exclude, include


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

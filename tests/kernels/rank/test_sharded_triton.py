"""The parts of ``sharded_target_stats`` by the Triton kernels: on a GPU and in the interpreter."""

import contextlib
import math

import pytest
import torch
from _support import non_finite_cases
from _support.rank_parts import part_stats
from _support.search_cases import SIMILARITIES, make, make_exclude, make_include

from r2ec_kernels import target_stats
from r2ec_kernels._block_sizes import block_sizes

INTERPRETED_TYPES = ("float32", "bfloat16")  # here the kernels widen what they multiply
INTERPRETED_SHARE = 3
KINDS = ("normal", "90% copies", "near ties", "row scales", "zero rows", "huge")
EDGES = (0, 33, 34, 90)


def small_blocks(device, **sizes):
    """In the interpreter: several tiles a split of the items, several splits."""
    if device == "cuda":
        return contextlib.nullcontext()
    from r2ec_kernels.rank.impl import triton as implementation

    sizes = {"BLOCK_ITEMS": 32, "BLOCK_QUERIES": 16, "PROGRAMS": 3} | sizes
    return block_sizes(implementation, **sizes)


def parts_on(device, queries, items, targets, *others):
    """The whole of the parts, on the CPU."""
    there = [x.to(device) for x in (queries, items, targets)]
    *_, whole = part_stats(*there, *others)
    return [x.cpu() for x in whole]


@pytest.mark.parametrize("number", range(12))
def test_parts_make_the_whole(number, device, dtype):
    kind, similarity = KINDS[number % 6], SIMILARITIES[number % 3]
    problem = make(kind, 5, 90, 20, number, dtype)
    targets = torch.tensor([0, 33, 34, 89, 50])
    exclude = make_exclude(5, 90, 9, number) if number % 4 else None
    if exclude is not None:
        exclude[1:3, 0] = targets[1:3]
    include = make_include(90, 40, "mask", number)[0] if number % 2 else None
    how = {"similarity": similarity, "temperature": 0.5, "exclude": exclude, "include": include}
    given = problem.queries, problem.items, targets
    want = target_stats(*given, impl="reference", **how)
    if exclude is not None:
        exclude = exclude.to(device)
    # no room for near-ties in half of the cases: canonical scores of all rows
    room = {"ROOM": 1, "MOST_ROOM": 1} if number % 5 == 0 else {}
    with small_blocks(device, **room):
        rank, log_prob = parts_on(
            device, *given, EDGES, "triton", similarity, 0.5, exclude, include
        )
    assert torch.equal(rank, want.rank)
    torch.testing.assert_close(log_prob, want.log_prob, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("where", non_finite_cases.WHERE)
def test_parts_of_what_is_not_finite(where, similarity, device):
    queries, items = non_finite_cases.make(where, torch.float32, count=201, batch=7)
    targets = torch.tensor([7, 0, 40, 11, 200, 1, 41])
    exclude = torch.tensor([[0, 7, 11]] * 7)
    want = non_finite_cases.stats_by_definition(queries, items, targets, similarity, 0.5, exclude)
    given = queries, items, targets, (0, 8, 150, 201), "triton", similarity, 0.5
    rank, log_prob = parts_on(device, *given, exclude.to(device), None)
    assert torch.equal(rank, want[0])
    torch.testing.assert_close(log_prob, want[1], rtol=1e-5, atol=1e-4)


def test_infinite_scores_share_the_mass_across_parts(device):
    inf, nan = math.inf, math.nan
    items = torch.tensor([[inf], [1.0], [inf], [-inf], [nan], [2.0], [inf]])
    queries = torch.tensor([[1.0], [-1.0]]).repeat_interleave(7, 0)
    given = queries, items, torch.arange(7).repeat(2), (0, 1, 4, 7), "triton", "dot", 1.0
    rank, log_prob = parts_on(device, *given, None, None)
    assert rank.tolist() == [1, 5, 2, 6, 7, 4, 3] + [4, 2, 5, 1, 7, 3, 6]
    third = -math.log(3)
    want = [third, -inf, third, -inf, -inf, -inf, third, *[-inf] * 3, 0.0, *[-inf] * 3]
    torch.testing.assert_close(log_prob, torch.tensor(want))
    given = torch.ones(5, 1), torch.full((5, 1), -inf), torch.arange(5), (0, 2, 5)
    rank, log_prob = parts_on(device, *given, "triton", "dot", 1.0, None, None)
    assert rank.tolist() == [1, 2, 3, 4, 5]
    torch.testing.assert_close(log_prob, torch.full((5,), -math.log(5)))


def test_a_foreign_row_beyond_float32(device):
    items = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
    items[100] = torch.tensor([3e38, 3e38, 3e38, -1e38])
    queries, targets = torch.ones(3, 4), torch.tensor([100, 3, 119])
    for temperature in (1e10, 1e37):
        want = target_stats(queries, items, targets, temperature=temperature, impl="torch")
        given = queries, items, targets, (0, 60, 120), "triton", "dot", temperature
        rank, log_prob = parts_on(device, *given, None, None)
        assert torch.equal(rank, want.rank)
        torch.testing.assert_close(log_prob, want.log_prob, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_large_parts(similarity, device, dtype):
    problem = make("90% copies", 40, 50_000, 128, 3, dtype)
    targets = torch.arange(40) * 1250
    given = problem.queries, problem.items, targets
    want = target_stats(*given, similarity=similarity, temperature=0.1, impl="torch")
    edges = (0, 17, 20_000, 50_000)
    rank, log_prob = parts_on(device, *given, edges, "triton", similarity, 0.1, None, None)
    assert torch.equal(rank, want.rank)
    torch.testing.assert_close(log_prob, want.log_prob, rtol=1e-5, atol=1e-3)

"""target_stats by its Triton kernel: on a GPU and in Triton's interpreter, ranks bit for bit."""

import contextlib

import pytest
import torch

from r2ec_kernels import target_stats
from r2ec_kernels._block_sizes import block_sizes

INTERPRETED_TYPES = ("float32", "bfloat16")  # the kernel multiplies in float32
INTERPRETED_SHARE = 5
KINDS = ("normal", "integers", "copies", "row scales", "all equal", "near ties", "zero rows")


def table(kind, count, dim, generator):
    items = torch.randn(count, dim, generator=generator)
    if kind == "integers":
        items = items.round()
    elif kind == "copies":
        items = items[torch.randint(0, max(count // 5, 1), (count,), generator=generator)]
    elif kind == "row scales":
        items *= torch.exp2(torch.randint(-10, 11, (count, 1), generator=generator))
    elif kind == "all equal":
        items[:] = items[0]
    elif kind == "near ties":  # neighbours in float32
        steps = torch.randint(-2, 3, (count, dim), generator=generator)
        items = items[:1] * (1 + steps * 2.0**-23)
    elif kind == "zero rows":
        items[torch.rand(count, generator=generator) < 0.4] = 0
    return items


def make(kind, batch, count, dim, device, dtype):
    """(queries, items, targets, exclude); every target is in its own history."""
    generator = torch.Generator().manual_seed(count)
    items = table(kind, count, dim, generator)
    queries = torch.randn(batch, dim, generator=generator)
    queries = queries.round() if kind == "integers" else queries
    targets = torch.randint(0, count, (batch,), generator=generator)
    exclude = torch.randint(-1, count, (batch, 6), generator=generator)
    exclude[:, 0] = targets
    return [x.to(device) for x in (queries.to(dtype), items.to(dtype), targets, exclude)]


def small_blocks(device, **others):
    """In the interpreter: several tiles a split of the items, several splits."""
    if device == "cuda":
        return contextlib.nullcontext()
    from r2ec_kernels.rank.impl import triton as implementation

    return block_sizes(implementation, BLOCK_ITEMS=32, BLOCK_QUERIES=16, PROGRAMS=3, **others)


def check(problem, **how):
    queries, items, targets, exclude = problem
    how |= {"exclude": exclude}
    got = target_stats(queries, items, targets, impl="triton", **how)
    want = target_stats(queries, items, targets, impl="reference", **how)
    assert got.rank.dtype == torch.int64 and got.log_prob.dtype == torch.float32
    assert torch.equal(got.rank, want.rank)
    # a mean of the scores' errors, which grow with the scores
    torch.testing.assert_close(got.log_prob, want.log_prob, rtol=1e-5, atol=1e-4)
    return got


@pytest.mark.parametrize("similarity", ["dot", "cosine", "l2"])
@pytest.mark.parametrize(
    ("batch", "count", "dim"),
    [
        (1, 1, 3),
        (5, 63, 20),
        (17, 150, 33),
        pytest.param(33, 1999, 72, marks=pytest.mark.gpu),
        pytest.param(3, 70_001, 60, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_exact(kind, batch, count, dim, similarity, device, dtype):
    problem = make(kind, batch, count, dim, device, dtype)
    with small_blocks(device):
        check(problem, similarity=similarity, temperature=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize(
    ("batch", "count", "dim"), [(1, 300_001, 128), (16, 100_003, 1000), (65, 50_001, 576)]
)
def test_large(batch, count, dim, similarity, device, dtype):
    check(make("normal", batch, count, dim, device, dtype), similarity=similarity)


@pytest.mark.parametrize("kind", ["all equal", "near ties"])
def test_more_ties_than_there_is_room_for(kind, device, dtype):
    """They take the dense path; ranks stay exact, whatever order the list was filled in."""
    count = 150 if device == "cpu" else 70_001  # above the room of 17 queries
    problem = make(kind, 17, count, 20, device, dtype)
    with small_blocks(device, ROOM=4, MOST_ROOM=1):
        got = check(problem)
    if kind == "all equal":
        ahead = (problem[3][:, 1:, None] == torch.arange(count, device=device)).any(1)
        ids = torch.arange(count, device=device)
        alive = (ids < problem[2][:, None]) & ~ahead
        assert torch.equal(got.rank, 1 + alive.sum(1))


@pytest.mark.parametrize("form", ["none", "ragged", "all"])
def test_exclusions(form, device, dtype):
    queries, items, targets, padded = make("normal", 4, 130, 24, device, dtype)
    exclude = None
    if form == "ragged":
        exclude = (padded.flatten().clamp(min=0), torch.arange(5, device=device) * 6)
    elif form == "all":
        exclude = torch.arange(130, device=device).expand(4, -1).contiguous()
    with small_blocks(device):
        got = check((queries, items, targets, exclude))
    if form == "all":
        assert got.rank.tolist() == [1] * 4
        torch.testing.assert_close(got.log_prob.cpu(), torch.zeros(4), rtol=0, atol=1e-6)


def test_rows_apart_and_nothing(device, dtype):
    queries, items, targets, exclude = make("normal", 5, 200, 51, device, dtype)
    wide = torch.zeros(200, 55, dtype=dtype, device=device)
    wide[:, 2:53] = items
    with small_blocks(device):
        for rows in (wide[:, 2:53], items.T.contiguous().T):
            check((queries, rows, targets, exclude), similarity="cosine", temperature=0.1)
    empty = target_stats(queries[:0], items, targets[:0], impl="triton")
    assert empty.rank.shape == empty.log_prob.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend, device):
    queries, items, targets, exclude = make("normal", 5, 4000, 32, device, torch.bfloat16)

    def run(queries, items, targets, exclude):
        how = {"similarity": "cosine", "temperature": 0.1, "exclude": exclude}
        return target_stats(queries * 2, items, targets, **how, impl="triton")

    got = torch.compile(run, fullgraph=True, backend=backend)(queries, items, targets, exclude)
    want = run(queries, items, targets, exclude)
    assert torch.equal(got.rank, want.rank)
    torch.testing.assert_close(got.log_prob, want.log_prob, rtol=1e-6, atol=1e-6)

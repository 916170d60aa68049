"""item_topk by its Triton kernel: on a GPU and in Triton's interpreter, bit for bit the reference.

Problems are made on the CPU, so that both devices see one problem.
"""

import subprocess
import sys
from functools import partial

import pytest
import torch
from _support.search_cases import (
    KINDS,
    SIMILARITIES,
    Problem,
    as_sets,
    assert_same,
    canonical,
    make,
    make_exclude,
    sorted_topk,
)

from r2ec_kernels import item_topk

INTERPRETED_SHARE = 6


def on(device, problem):
    return Problem(problem.queries.to(device), problem.items.to(device))


def assert_equals_the_reference(problem, k, **how):
    queries, items = problem.queries, problem.items
    got = item_topk(queries, items, k, impl="triton", **how)
    assert_same(got, item_topk(queries, items, k, impl="reference", **how))
    return got


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_stable_sort(kind, similarity, device, dtype):
    problem = make(kind, 5, 420, 40, 11, dtype)
    exclude = make_exclude(5, 420, 12, 11)
    scores = canonical(problem.queries, problem.items, similarity, 0.02)
    there = on(device, problem)
    run = partial(item_topk, there.queries, there.items, similarity=similarity, temperature=0.02)
    for k in (1, 6):
        want = sorted_topk(scores, k, as_sets(exclude))
        got = run(k, exclude=exclude.to(device), impl="triton")
        assert_same([x.cpu() for x in got], want)


@pytest.mark.parametrize("k", [1, 7, 600])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize(
    ("batch", "count", "dim"),
    [
        (1, 1, 1),
        (2, 63, 60),
        (17, 500, 33),
        (3, 1025, 72),
        pytest.param(65, 2049, 576, marks=pytest.mark.gpu),
        pytest.param(130, 4097, 300, marks=pytest.mark.gpu),
        pytest.param(16, 66_000, 31, marks=pytest.mark.gpu),
    ],
)
def test_odd_grid(batch, count, dim, similarity, k, device, dtype):
    problem = on(device, make("row scales", batch, count, dim, count, dtype))
    assert_equals_the_reference(problem, k, similarity=similarity, temperature=1.3)


@pytest.mark.gpu
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(
    ("batch", "count", "dim", "k"),
    [
        (1, 300_001, 128, 10),
        (17, 200_003, 576, 100),
        (16, 100_003, 1000, 100),
        (1024, 20_021, 256, 10),
        (8, 100_000, 96, 1000),
    ],
)
def test_large(batch, count, dim, k, similarity, device, dtype):
    problem = on(device, make("normal", batch, count, dim, 3, dtype))
    exclude = make_exclude(batch, count, 50, 3).to(device)
    assert_equals_the_reference(
        problem, k, similarity=similarity, temperature=0.05, exclude=exclude
    )


@pytest.mark.parametrize("k", [64, 700, 900])
def test_many_wanted(k, device, dtype):
    problem = on(device, make("90% copies", 4, 700, 24, 2, dtype))
    scores, indices = assert_equals_the_reference(problem, k)
    assert (indices[:, 700:] == -1).all() and torch.isinf(scores[:, 700:]).all()


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("num_excluded", [0, 1, 300, 400])
def test_exclusions_padded_and_ragged(num_excluded, k, device, dtype):
    """The best are excluded, up to all there are."""
    problem = on(device, make("normal", 2, 400, 24, 7, dtype))
    best = item_topk(problem.queries, problem.items, 400, impl="reference").indices
    padded = torch.cat([best[:, :num_excluded], torch.full_like(best[:, :2], -1)], 1)
    first = assert_equals_the_reference(problem, k, exclude=padded)
    assert torch.equal(first.indices[:, : 400 - num_excluded], best[:, num_excluded:][:, :k])
    offsets = torch.arange(3, device=device) * num_excluded
    ragged = (best[:, :num_excluded].flatten(), offsets)
    assert_same(assert_equals_the_reference(problem, k, exclude=ragged), first)


def test_empty(device, dtype):
    problem = on(device, make("normal", 3, 40, 8, 0, dtype))
    run = partial(item_topk, impl="triton")
    assert run(problem.queries, problem.items, 0).indices.shape == (3, 0)
    assert run(problem.queries[:0], problem.items, 4).scores.shape == (0, 4)
    assert (run(problem.queries, problem.items[:0], 4).indices == -1).all()


def test_rows_apart(device, dtype):
    """Strides that no row is aligned to; columns side by side in neither."""
    problem = on(device, make("normal", 5, 2000, 51, 5, dtype))
    wide = torch.zeros(2000, 55, dtype=dtype, device=device)
    wide[:, 2:53] = problem.items
    want = item_topk(problem.queries, problem.items, 9, impl="reference")
    assert_same(item_topk(problem.queries, wide[:, 2:53], 9, impl="triton"), want)
    columns = problem.items.T.contiguous().T
    assert_same(item_topk(problem.queries, columns, 9, impl="triton"), want)


@pytest.mark.parametrize("temperature", [2.0**140, 1e-40, 1e-20])
def test_temperatures_that_leave_float32(temperature, device):
    problem = on(device, make("normal", 2, 3000, 8, 4))
    assert_equals_the_reference(problem, 6, temperature=temperature)


def test_is_chosen_on_a_gpu(device, monkeypatch):
    """Without a name the kernel runs: on a GPU by itself, elsewhere by R2EC_IMPL."""
    from r2ec_kernels.topk.impl import triton as implementation

    if device == "cpu":
        monkeypatch.setenv("R2EC_IMPL", "triton")
    calls = []
    run = implementation.item_topk
    monkeypatch.setattr(implementation, "item_topk", lambda *a: calls.append(a) or run(*a))
    problem = on(device, make("normal", 2, 900, 16, 1))
    item_topk(problem.queries, problem.items, 3)
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend, device):
    problem = on(device, make("normal", 4, 9000, 32, 6))
    exclude = make_exclude(4, 9000, 5, 6).to(device)

    def run(queries, items, exclude):
        top = item_topk(queries * 2, items, 7, similarity="cosine", exclude=exclude, impl="triton")
        return top.scores + 1, top.indices

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    given = (problem.queries, problem.items, exclude)
    assert_same(compiled(*given), run(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("excludes", [False, True])
def test_is_captured_in_a_cuda_graph(excludes, device, dtype):
    """Replays answer new queries; one that would need the host is NaN, and rare here."""
    first, then = (on(device, make("normal", 16, 50_000, 128, seed, dtype)) for seed in (1, 2))
    exclude = make_exclude(16, 50_000, 8, 1).to(device) if excludes else None
    queries, items = first.queries.clone(), first.items
    search = partial(item_topk, queries, items, 10, exclude=exclude, impl="triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        search()  # compiles the kernel before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, indices = search()
    for problem in (first, then):
        queries.copy_(problem.queries)
        graph.replay()
        want = item_topk(problem.queries, items, 10, exclude=exclude, impl="reference")
        answered = ~scores.isnan().any(1)
        assert answered.float().mean() > 0.8
        assert torch.equal(scores[answered], want.scores[answered])
        assert torch.equal(indices[answered], want.indices[answered])
        assert (indices[~answered] == -1).all()


def test_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import r2ec_kernels, torch; " + (
        "q = torch.eye(3); print(r2ec_kernels.item_topk(q, q, 1).indices.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[0], [1], [2]]"

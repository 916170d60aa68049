"""item_topk and ItemIndex.search against a stable sort of canonical scores."""

from functools import partial

import pytest
import torch
from _support.search_cases import (
    KINDS,
    SIMILARITIES,
    as_sets,
    assert_same,
    canonical,
    make,
    make_exclude,
    sorted_topk,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from r2ec_kernels import ItemIndex, item_topk

SCANS = ("none", "fp16", "bf16", "int8", "auto")
# (batch, items, dim): the larger ones leave the dense path for small k.
SHAPES = ((1, 1, 1), (2, 63, 60), (5, 500, 33), (3, 1900, 24))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def searches(problem, exclude, how):
    """Every path to a top-k of one problem: (name, function of k)."""
    queries, items = problem.queries, problem.items
    for impl in ("torch", "reference"):
        run = partial(item_topk, queries, items, exclude=exclude, impl=impl, **how)
        yield impl, run
    for scan in SCANS:
        index = ItemIndex(items, scan=scan, **how)
        yield scan, partial(index.search, queries, exclude=exclude)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_path_equals_a_stable_sort(kind, similarity):
    # 45 kinds and similarities x 4 shapes x 6 paths x 3 k: 3,240 comparisons
    how = {"similarity": similarity, "temperature": 0.02}
    for number, (batch, count, dim) in enumerate(SHAPES):
        problem = make(kind, batch, count, dim, 100 + number, DTYPES[number % 3])
        exclude = make_exclude(batch, count, 7, number)
        scores = canonical(problem.queries, problem.items, similarity, 0.02)
        want = {k: sorted_topk(scores, k, as_sets(exclude)) for k in (1, 9, count)}
        for _, run in searches(problem, exclude, how):
            for k, top in want.items():
                assert_same(run(k), top)


def test_more_than_all_none_and_nothing():
    problem = make("normal", 3, 20, 8, 0)
    want = sorted_topk(canonical(problem.queries, problem.items, "dot", 1.0), 30)
    assert_same(item_topk(problem.queries, problem.items, 30), want)
    assert (want[1][:, 20:] == -1).all() and torch.isinf(want[0][:, 20:]).all()
    assert item_topk(problem.queries, problem.items, 0).indices.shape == (3, 0)
    assert item_topk(problem.queries[:0], problem.items, 4).scores.shape == (0, 4)
    assert (item_topk(problem.queries, problem.items[:0], 4).indices == -1).all()


def test_everything_excluded():
    problem = make("normal", 2, 40, 8, 1)
    exclude = torch.arange(40).expand(2, -1)
    for impl in ("torch", "reference"):
        top = item_topk(problem.queries, problem.items, 5, exclude=exclude, impl=impl)
        assert (top.indices == -1).all() and torch.isinf(top.scores).all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_padded_and_ragged_exclusions_agree(impl):
    problem = make("normal", 4, 300, 16, 2)
    padded = make_exclude(4, 300, 50, 2)
    rows = [row[row >= 0] for row in padded]
    offsets = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0)])
    how = {"k": 20, "impl": impl}
    first = item_topk(problem.queries, problem.items, **how, exclude=padded)
    assert_same(
        item_topk(problem.queries, problem.items, **how, exclude=(torch.cat(rows), offsets)), first
    )
    scores = canonical(problem.queries, problem.items, "dot", 1.0)
    assert_same(first, sorted_topk(scores, 20, as_sets(padded)))


def test_exclusions_never_cost_a_place():
    problem = make("normal", 3, 4000, 16, 3)
    best = item_topk(problem.queries, problem.items, 100).indices
    rest = item_topk(problem.queries, problem.items, 10, exclude=best[:, :90])
    assert torch.equal(rest.indices, best[:, 90:])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(0, 700),
    st.integers(1, 40),
    st.integers(0, 30),
    st.sampled_from(SIMILARITIES),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from([1.0, 0.02, 37.5]),
    st.sampled_from(SCANS),
    st.integers(0, 2**31),
)
def test_property(batch, count, dim, k, similarity, kind, temperature, scan, seed):
    count = max(count, 1) if kind in ("all equal", "near ties") else count
    problem = make(kind, batch, count, dim, seed)
    exclude = make_exclude(batch, count, 3, seed) if count else None
    how = {"similarity": similarity, "temperature": temperature}
    want = item_topk(problem.queries, problem.items, k, **how, exclude=exclude, impl="reference")
    assert_same(item_topk(problem.queries, problem.items, k, **how, exclude=exclude), want)
    index = ItemIndex(problem.items, **how, scan=scan)
    assert_same(index.search(problem.queries, k, exclude=exclude), want)


def test_scores_that_overflow_float32_tie():
    items = torch.full((3000, 4), 1e30)
    items[1::2] *= 2
    queries = torch.full((2, 4), 1e30)
    top = item_topk(queries, items, 5)
    assert torch.isinf(top.scores).all() and top.indices.tolist() == [[0, 1, 2, 3, 4]] * 2
    items = items * 1e-15
    top = item_topk(queries * 1e-15, items, 5, temperature=1e-30)
    assert torch.isinf(top.scores).all() and top.indices.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_temperature_may_flush_scores_to_ties():
    problem = make("normal", 2, 3000, 8, 4)
    for temperature in (2.0**140, 1e-40):
        want = item_topk(
            problem.queries, problem.items, 6, temperature=temperature, impl="reference"
        )
        got = item_topk(problem.queries, problem.items, 6, temperature=temperature, impl="torch")
        assert_same(got, want)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_reduced_float32_products_stay_exact(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        problem = make("shared mean", 4, 5000, 64, 5)
        want = item_topk(problem.queries, problem.items, 20, impl="reference")
        assert_same(item_topk(problem.queries, problem.items, 20, impl="torch"), want)
    finally:
        torch.set_float32_matmul_precision(before)


def test_non_contiguous_inputs():
    queries = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).T
    items = torch.randn(16, 2000, generator=torch.Generator().manual_seed(1)).T[:, ::2]
    want = item_topk(queries.contiguous(), items.contiguous(), 9)
    assert_same(item_topk(queries, items, 9), want)


def test_compiles_in_one_graph():
    problem = make("normal", 4, 3000, 16, 6)
    exclude = make_exclude(4, 3000, 5, 6)

    def run(queries, items, exclude):
        top = item_topk(queries * 2, items, 7, similarity="cosine", exclude=exclude)
        return top.scores + 1, top.indices

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(problem.queries, problem.items, exclude),
        run(problem.queries, problem.items, exclude),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(ragged):
    problem = make("normal", 3, 500, 16, 7)
    exclude, offsets = make_exclude(3, 500, 4, 7), None
    if ragged:
        exclude, offsets = torch.tensor([5, 7, 7, 1]), torch.tensor([0, 2, 2, 4])
    library.opcheck(
        torch.ops.r2ec_kernels.item_topk.default,
        (problem.queries, problem.items, 5, "dot", 0.5, exclude, offsets, None, "auto"),
    )


def test_memory_does_not_grow_with_the_table():
    """Largest tensor that one search allocates: O(B k + block), whatever N."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                self.size = max(self.size, out.untyped_storage().nbytes())
            return out

    from r2ec_kernels.topk.impl.torch import item_topk as run

    sizes = []
    for count in (20_000, 80_000):
        problem = make("normal", 16, count, 32, 8)
        with Largest() as largest:
            run(problem.queries, problem.items, 10, "dot", 1.0, None)
        sizes.append(largest.size)
    table = 20_000 * 32 * 4
    assert max(sizes) < 16 * 80_000 * 4 / 2
    assert sizes[1] <= max(sizes[0], table) * 1.1

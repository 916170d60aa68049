"""The search in a handful of compiled calls: equal to a stable sort, or none at all."""

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
from torch.utils._python_dispatch import TorchDispatchMode

from r2ec_kernels import ItemIndex, item_topk
from r2ec_kernels._cpu import extension
from r2ec_kernels._exact.excluded import normalize_exclude
from r2ec_kernels._scan import row_search
from r2ec_kernels.topk.impl import torch as by_torch

pytestmark = pytest.mark.skipif(
    not extension.available(torch.device("cpu")), reason="needs the C++ extension"
)
CPU = torch.device("cpu")


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def kind(request):
    if request.param not in extension.cpu_kinds():
        pytest.skip(f"this CPU is not of the kind {request.param}")
    with extension.use_cpu(request.param):
        yield


def search(problem, k, exclude=None, *, similarity="dot", temperature=0.02, limit=5000, **names):
    values = offsets = None
    if exclude is not None:
        values, offsets = normalize_exclude(exclude, len(problem.queries), len(problem.items), CPU)
    assert row_search.can_search(problem.items, problem.queries, k)
    settings = {"similarity": similarity, "temperature": temperature, "limit": limit}
    left_out = {"excluded": values, "offsets": offsets}
    return row_search.search(problem.items, problem.queries, k, **settings, **names, **left_out)


@pytest.mark.parametrize("batch", [1, 8, 9, 40])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_it_finds_what_a_stable_sort_finds(kind, similarity, batch):
    problem = make("normal", batch, 2000, 33, 7 + batch, torch.float32)
    scores = canonical(problem.queries, problem.items, similarity, 0.02)
    norms = torch.linalg.vector_norm(problem.items, dim=1)
    exclude = make_exclude(batch, 2000, 25, batch)
    exclude[:, :5] = sorted_topk(scores, 5)[1]  # the best ones too
    for k in (1, 10, 200):
        for left_out in (None, exclude):
            want = sorted_topk(scores, k, None if left_out is None else as_sets(left_out))
            for given in (None, norms):
                found = search(problem, k, left_out, similarity=similarity, norms=given)
                assert found is not None
                assert_same((found.scores, found.ids), want)
                assert batch * k <= found.candidates <= found.met


@pytest.mark.parametrize("blocks", [1, 7])
def test_blocks_and_sorted_rows(kind, blocks, monkeypatch):
    """The worst order for thresholds: every row beats all before it."""
    problem = make("normal", 12, 3000, 16, 3, torch.float32)
    order = (problem.items @ problem.queries[0]).argsort()
    problem = type(problem)(problem.queries, problem.items[order].contiguous())
    monkeypatch.setattr(row_search, "_PRODUCT_ROWS", -(-3000 // blocks))
    found = search(problem, 20, limit=672)
    assert found is not None
    want = sorted_topk(canonical(problem.queries, problem.items, "dot", 0.02), 20)
    assert_same((found.scores, found.ids), want)


@pytest.mark.parametrize("problem_kind", KINDS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_it_finds_the_same_or_gives_up(kind, problem_kind, similarity):
    for batch in (3, 20):
        problem = make(problem_kind, batch, 900, 24, 60 + batch, torch.float32)
        want = sorted_topk(canonical(problem.queries, problem.items, similarity, 0.02), 9)
        found = search(problem, 9, similarity=similarity, limit=584)
        if found is not None:
            assert_same((found.scores, found.ids), want)
        assert_same(
            item_topk(problem.queries, problem.items, 9, similarity=similarity, temperature=0.02),
            want,
        )


def changed(what):
    """A problem of 20 queries without a bound, or with too many ties."""
    problem = make("normal", 20, 900, 24, 5, torch.float32)
    queries, items = problem.queries.clone(), problem.items.clone()
    if what == "a huge query":
        queries[3] *= 2.0**40
    elif what == "a query of NaN":
        queries[3, 1] = float("nan")
    elif what == "a row of infinity":
        items[700, 2] = float("inf")
    elif what == "a row of NaN":
        items[700, 2] = float("nan")
    elif what == "a huge row":
        items[700] *= 2.0**60
    elif what == "equal rows":
        items[:] = items[0]
    return type(problem)(queries, items)


@pytest.mark.parametrize("batch", [4, 20])
@pytest.mark.parametrize(
    "what",
    [
        *("a huge query", "a query of NaN", "a row of infinity", "a row of NaN"),
        *("a huge row", "equal rows"),
    ],
)
def test_it_gives_up_where_it_cannot_tell(kind, what, batch):
    problem = changed(what)
    problem = type(problem)(problem.queries[:batch], problem.items)
    assert search(problem, 9, limit=584) is None
    found = item_topk(problem.queries, problem.items, 9)
    reference = item_topk(problem.queries, problem.items, 9, impl="reference")
    assert_same(found, (reference.scores, reference.indices))


def test_the_ends_of_its_range():
    problem = make("normal", 12, 900, 24, 5, torch.float32)
    assert search(problem, 9, temperature=2.0**-51) is None
    large = type(problem)(problem.queries * 2.0**22, problem.items * 2.0**47)
    found = search(large, 9, temperature=2.0**-50)
    assert found is not None and found.scores.max() < torch.inf
    want = sorted_topk(canonical(large.queries, large.items, "dot", 2.0**-50), 9)
    assert_same((found.scores, found.ids), want)
    assert search(type(problem)(large.queries * 16, problem.items), 9) is None
    small = type(problem)(problem.queries, problem.items * 2.0**-70)
    found = search(small, 9, temperature=1.0)
    if found is not None:
        assert_same(
            (found.scores, found.ids),
            sorted_topk(canonical(small.queries, small.items, "dot", 1), 9),
        )


def test_a_query_that_excludes_nearly_everything():
    problem = make("normal", 10, 900, 24, 5, torch.float32)
    exclude = torch.full((10, 890), -1)
    exclude[4] = torch.arange(890)
    assert search(problem, 9, exclude) is None
    found = item_topk(problem.queries, problem.items, 9, exclude=exclude)
    scores = canonical(problem.queries, problem.items, "dot", 1.0)
    assert_same(found, sorted_topk(scores, 9, as_sets(exclude)))


@pytest.mark.parametrize(
    ("rows", "queries", "k"),
    [
        (torch.zeros(90, 4, dtype=torch.bfloat16), torch.zeros(1, 4), 5),
        (torch.zeros(90, 4), torch.zeros(1, 4, dtype=torch.float16), 5),
        (torch.zeros(4, 90).T, torch.zeros(1, 4), 5),  # columns are not side by side
        (torch.zeros(90, 4), torch.zeros(0, 4), 5),
        (torch.zeros(90, 4), torch.zeros(1, 4), 0),
        (torch.zeros(90, 4), torch.zeros(1, 4), 12),  # more than an eighth
        (torch.zeros(0, 4), torch.zeros(1, 4), 1),
    ],
)
def test_what_it_does_not_search(rows, queries, k):
    assert not row_search.can_search(rows, queries, k)


def test_not_where_float32_is_less_than_it_says():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        assert not row_search.can_search(torch.zeros(90, 4), torch.zeros(1, 4), 5)
    finally:
        matmul.fp32_precision = before
    assert row_search.can_search(torch.zeros(90, 4), torch.zeros(1, 4), 5)


def test_an_index_that_changes():
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(1200, 40, generator=generator)
    index = ItemIndex(rows, scan="none")
    queries = torch.randn(11, 40, generator=generator)
    index.remove([5, 700, 3])
    added = index.append(torch.randn(30, 40, generator=generator))
    index.write(added[:2], 3 * queries[:2])
    exclude = [[int(added[0]), 3, 9]] + [[]] * 10  # 3 was removed
    table = index.items
    scores = canonical(queries, table, "dot", 1.0)
    hidden = [{3, 5, 700} | set(own) for own in exclude]
    assert_same(index.search(queries, 8, exclude=exclude), sorted_topk(scores, 8, hidden))
    stats = index.last_search
    assert (stats.scan, stats.dense_rows, stats.queries) == ("float32", 0, 11)
    assert 1 <= stats.candidates_per_k < 2 and stats.rescanned_groups >= 88


def test_an_index_stops_asking_what_mostly_fails(monkeypatch):
    asked = []
    real = row_search.search

    def counted(*arguments, **settings):
        asked.append(1)
        return real(*arguments, **settings)

    monkeypatch.setattr(row_search, "search", counted)
    index = ItemIndex(torch.ones(1200, 8), scan="none")
    for _ in range(9):
        assert index.search(torch.ones(3, 8), 2).indices.tolist() == [[0, 1]] * 3
    assert len(asked) == 3
    good = ItemIndex(torch.randn(1200, 8), scan="none")
    for _ in range(9):
        good.search(torch.randn(3, 8), 2)
    assert len(asked) == 12


@pytest.mark.parametrize("batch", [1, 20])
def test_it_takes_a_handful_of_operations(batch):
    """What it is for. With k above an eighth of the rows the general search does the work."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    problem = make("normal", batch, 900, 24, 5, torch.float32)
    with Count() as few:
        by_torch.item_topk(problem.queries, problem.items, 112, "dot", 1.0, None)
    with Count() as many:
        by_torch.item_topk(problem.queries, problem.items, 113, "dot", 1.0, None)
    assert few.calls <= 15 and many.calls >= 3 * few.calls, (few.calls, many.calls)

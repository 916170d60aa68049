"""Allow-lists of a search, on every path of a CPU: item_topk and ItemIndex against a sort."""

import numpy as np
import pytest
import torch
from _support.search_cases import (
    INCLUDE_FORMS,
    KINDS,
    SIMILARITIES,
    as_sets,
    assert_same,
    canonical,
    make,
    make_exclude,
    make_include,
    sorted_topk,
    without,
)
from torch import library

from r2ec_kernels import ItemIndex, item_topk
from r2ec_kernels._cpu import extension
from r2ec_kernels._exact import included
from r2ec_kernels._scan import float32

SCANS = ("none", "fp16", "bf16", "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["gathered", "switched off"])
def way(request, monkeypatch):
    """Both ways to leave the other rows out, whatever the sizes; blocks of 256 rows."""
    share = 1 if request.param == "gathered" else 1 << 40
    monkeypatch.setattr(included, "_GATHERED_SHARE", share)
    monkeypatch.setattr(float32, "_BLOCK", 1)
    return request.param


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_by_hand(impl):
    items = torch.tensor([[5.0], [1.0], [4.0], [4.0], [9.0], [2.0]])
    queries = torch.tensor([[1.0], [-1.0]])
    got = item_topk(queries, items, 3, include=[3, 2, 0, 3, 5], exclude=[[0], [4, 5]], impl=impl)
    assert got.indices.tolist() == [[2, 3, 5], [2, 3, 0]]
    assert got.scores.tolist() == [[4, 4, 2], [-4, -4, -5]]
    mask = torch.tensor([False, True, False, False, True, False])
    got = item_topk(queries, items, 3, include=mask, exclude=[[0], [4, 5]], impl=impl)
    assert got.indices.tolist() == [[4, 1, -1], [1, -1, -1]]
    assert got.scores.tolist() == [[9, 1, -np.inf], [-1, -np.inf, -np.inf]]


@pytest.mark.parametrize("form", INCLUDE_FORMS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_item_topk_follows_the_definition(similarity, form, way):
    # 2 ways x 15 of similarities and forms x 15 kinds x (torch, compiled) : 900 comparisons
    for number, kind in enumerate(KINDS):
        batch, count = (3, 700) if number % 2 else (2, 90)
        size = (0, 1, count // 12, count // 2, count)[number % 5]
        problem = make(kind, batch, count, 12, number, DTYPES[number % 3])
        include, named = make_include(count, size, form, number)
        exclude = make_exclude(batch, count, count // 9, number)
        scores = canonical(problem.queries, problem.items, similarity, 0.02)
        hidden = without(named, count, as_sets(exclude))
        k = (1, 3, count // 3)[number % 3]
        want = sorted_topk(scores, k, hidden)
        how = {"similarity": similarity, "temperature": 0.02, "exclude": exclude}
        for cpu in ("none", extension.cpu_kinds()[0]):
            with extension.use_cpu(cpu):
                assert_same(item_topk(*_both(problem), k, include=include, **how), want)


def _both(problem):
    return problem.queries, problem.items


@pytest.mark.parametrize("cpu", ["none", "best"])
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_an_index_follows_the_definition(similarity, scan, cpu, way):
    """Through its life, with ids that are gone: 48 of sides x 14 kinds and steps."""
    with extension.use_cpu(extension.cpu_kinds()[0] if cpu == "best" else cpu):
        for number, kind in enumerate(KINDS):
            problem = make(kind, 3, 600, 24, number)
            index = ItemIndex(
                problem.items[:500], similarity=similarity, temperature=0.02, scan=scan
            )
            gone = torch.randperm(500)[: 60 * (number % 3)]
            index.remove(gone)
            index.append(problem.items[500:])
            index.write(index.ids[::7], problem.items[:100][: len(index.ids[::7])])
            _check_index(index, problem.queries, set(gone.tolist()), number)


def _check_index(index, queries, gone, number):
    count = len(index.items)
    form = INCLUDE_FORMS[number % len(INCLUDE_FORMS)]
    size = (count, 150, 40, 1, 0, count // 2)[number % 6]
    include, named = make_include(count, size, form, number)
    exclude = make_exclude(len(queries), count, 50, number)
    hidden = without(named - gone, count, as_sets(exclude))
    scores = canonical(queries, index.items, index.similarity, 0.02)
    for k in (2, 70):
        want = sorted_topk(scores, k, hidden)
        assert_same(index.search(queries, k, exclude=exclude, include=include), want)


def test_an_index_that_is_empty_or_emptied():
    index = ItemIndex(torch.empty(0, 4), scan="none")
    assert (index.search(torch.ones(2, 4), 2, include=[]).indices == -1).all()
    index.append(torch.eye(4))
    index.remove([0, 1, 3])
    assert index.search(torch.ones(1, 4), 2, include=[0, 2, 1]).indices.tolist() == [[2, -1]]
    index.remove([2])
    mask = np.ones(4, bool)
    assert (index.search(torch.ones(2, 4), 2, include=mask).indices == -1).all()


@pytest.mark.parametrize("similarity", ["dot", "l2"])
def test_rows_beyond_float32_that_are_not_included_stay_out(similarity, way):
    """No scan bounds their scores, so that all of them are rescored where they are included."""
    problem = make("normal", 3, 900, 24, 4)
    problem.items[::100] *= 2.0**80
    include = torch.arange(900) % 2 == 1
    include[[200, 300]] = True
    scores = canonical(*_both(problem), similarity, 1.0)
    want = sorted_topk(scores, 5, [set((~include).nonzero()[:, 0].tolist())] * 3)
    how = {"similarity": similarity}
    for cpu in ("none", extension.cpu_kinds()[0]):
        with extension.use_cpu(cpu):
            assert_same(item_topk(*_both(problem), 5, include=include, **how), want)
            for scan in SCANS:
                index = ItemIndex(problem.items, scan=scan, **how)
                assert_same(index.search(problem.queries, 5, include=include), want)


def test_no_query_of_a_plain_table_is_left_to_the_dense_path(way):
    problem = make("normal", 4, 3000, 24, 1)
    for scan in SCANS:
        index = ItemIndex(problem.items, scan=scan)
        index.search(problem.queries, 5, include=torch.arange(0, 3000, 3))
        assert index.last_search.dense_rows == 0
        assert index.last_search.scan == ("float32" if way == "gathered" else _name(index, scan))


def _name(index, scan):
    index.search(torch.ones(4, 24), 5)
    return index.last_search.scan


def test_a_large_share_is_not_copied(monkeypatch):
    monkeypatch.setattr(included, "_GATHERED_BYTES", 1000)
    problem = make("normal", 2, 4000, 16, 1)
    rows = ItemIndex(problem.items, scan="none")
    few, many = torch.arange(15), torch.arange(16)
    for include, gathered in ((few, True), (many, False)):
        table, _, _ = included.restrict(
            included.Table(problem.items),
            include,
            included.ExcludedPairs.from_offsets(few[:0], torch.zeros(3, dtype=torch.int64)),
        )
        assert (table.rows is not problem.items) == gathered
        want = item_topk(*_both(problem), 20, include=include, impl="reference")
        assert_same(rows.search(problem.queries, 20, include=include), want)


@pytest.mark.parametrize(
    ("include", "error", "words"),
    [
        ([0, 5], ValueError, "include: expected ids in 0..4, got values in 0..5"),
        (torch.tensor([-1, 2]), ValueError, "include: expected ids in 0..4, got values in -1..2"),
        (torch.ones(6, dtype=torch.bool), ValueError, r"include: expected a mask of shape \[5\]"),
        (np.ones((5, 1), bool), ValueError, r"include: expected ids \[S\] or a mask \[N\]"),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"include: expected shape \[n\]"),
        (torch.ones(3), TypeError, "include: expected int64"),
        ([True, False], TypeError, r"include\[0\]: expected an int, got bool"),
        ("ab", TypeError, "include: expected int64"),
    ],
)
def test_bad_lists_are_named(include, error, words):
    queries, items = torch.zeros(2, 4), torch.ones(5, 4)
    for impl in ("reference", "torch"):
        with pytest.raises(error, match=words):
            item_topk(queries, items, 1, include=include, impl=impl)
    with pytest.raises(error, match=words):
        ItemIndex(items).search(queries, 1, include=include)


def test_opcheck_and_one_graph():
    problem = make("normal", 3, 500, 16, 7)
    for include in (torch.arange(0, 500, 9), torch.arange(500) % 2 == 0):
        library.opcheck(
            torch.ops.r2ec_kernels.item_topk.default,
            (*_both(problem), 5, "dot", 0.5, None, None, include, "auto"),
        )

        def run(queries, items, include):
            return item_topk(queries * 2, items, 7, include=include).indices + 1

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        given = (*_both(problem), include)
        assert torch.equal(compiled(*given), run(*given))

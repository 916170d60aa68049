"""Allow-lists by the Triton kernels: on a GPU and in Triton's interpreter, bit for bit a sort."""

import pytest
import torch
from _support import search_cases
from _support.search_cases import (
    INCLUDE_FORMS,
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

from r2ec_kernels import ItemIndex, item_topk
from r2ec_kernels._exact import included

INTERPRETED_SHARE = 2

DTYPES = (torch.float32, torch.float16)  # what the interpreter multiplies rightly
KINDS = ("normal", "90% copies", "near ties", "wild scales", "zero rows")
SIZES = (130, 1, 260, 40)  # of allow-lists of 260 ids
PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 20))]
CASES = 25  # of a part


@pytest.fixture
def always_gathered(monkeypatch):
    """Ids, whatever the sizes; a mask never is, because its rows would have to be counted."""
    monkeypatch.setattr(included, "_GATHERED_SHARE", 1)
    monkeypatch.setattr(included, "_WORTH_BYTES", 0)


def on(device, include):
    return include.to(device) if isinstance(include, torch.Tensor) else include


@pytest.mark.parametrize("number", range(15))
def test_item_topk_follows_the_definition(number, device):
    follow_the_definition(number, device)


@pytest.mark.parametrize("number", range(0, 15, 3))
def test_gathered_rows_follow_the_definition(number, device, always_gathered):
    follow_the_definition(number, device)


def test_exclusions_of_gathered_rows_never_cost_a_place(device, always_gathered):
    """The best of those that are included are excluded."""
    problem = make("normal", 2, 400, 20, 6)
    include = torch.arange(399, 0, -2)
    best = item_topk(problem.queries, problem.items, 23, include=include, impl="reference")
    queries, items = problem.queries.to(device), problem.items.to(device)
    exclude = best.indices[:, :20].to(device)
    how = {"include": include.to(device), "exclude": exclude, "impl": "triton"}
    found = item_topk(queries, items, 3, **how)
    assert_same([x.cpu() for x in found], (best.scores[:, 20:], best.indices[:, 20:]))


@pytest.mark.parametrize("way", ["as it comes", "gathered"])
@pytest.mark.parametrize("part", PARTS)
def test_many_small_cases(part, way, device, request):
    """2 ways x 20 parts x 25: 1,000 comparisons of item_topk."""
    if way == "gathered":
        request.getfixturevalue("always_gathered")
    for number in range(part * CASES, part * CASES + CASES):
        problem, include, exclude, hidden, k = small_case(number)
        how = {"similarity": SIMILARITIES[number // 2 % 3], "temperature": 0.02}
        got = item_topk(
            problem.queries.to(device),
            problem.items.to(device),
            k,
            exclude=exclude.to(device),
            include=on(device, include),
            impl="triton",
            **how,
        )
        want = sorted_topk(canonical(problem.queries, problem.items, *how.values()), k, hidden)
        assert same(got, want), f"case {number}"


@pytest.mark.parametrize("scan", ["none", "bf16", "int8"])
@pytest.mark.parametrize("part", PARTS[:8])
def test_many_small_indexes(part, scan, device, monkeypatch):
    """3 scans x 8 parts x 25: 600 comparisons, with rows that are gone or were written anew."""
    if device == "cpu":
        monkeypatch.setenv("R2EC_IMPL", "triton")
    for number in range(part * CASES, part * CASES + CASES):
        problem, include, exclude, hidden, k = small_case(number, (torch.float32,))
        items = problem.items.to(device)
        how = {"similarity": SIMILARITIES[number // 2 % 3], "temperature": 0.5}
        index = ItemIndex(items[::2], scan=scan, **how)
        index.append(items[1::2])
        gone = torch.arange(number % 3, len(items), 5)
        index.remove(gone.to(device))
        index.write(index.ids[::9], items[: len(index.ids[::9])])
        got = index.search(
            problem.queries.to(device), k, exclude=exclude.to(device), include=on(device, include)
        )
        hidden = [out | set(gone.tolist()) for out in hidden]
        scores = canonical(problem.queries, index.items.cpu(), *how.values())
        assert same(got, sorted_topk(scores, k, hidden)), f"case {number}"


def small_case(number, dtypes=DTYPES):
    """A problem of any kind, an allow-list of any form and size, exclusions, what both hide from
    each query, and k up to a third of the rows."""
    count, batch = (33, 64, 90, 129)[number % 4], 1 + number % 3
    kind = list(search_cases.KINDS)[number % len(search_cases.KINDS)]
    problem = make(kind, batch, count, (8, 20)[number % 2], number, dtypes[number % len(dtypes)])
    size = (0, 1, count // 12, count // 2, count - 1, count)[number % 6]
    form = INCLUDE_FORMS[number // 3 % len(INCLUDE_FORMS)]
    include, named = make_include(count, size, form, number)
    exclude = make_exclude(batch, count, count // 9, number)
    k = (1, 3, count // 3)[number // 5 % 3]
    return problem, include, exclude, without(named, count, as_sets(exclude)), k


def same(got, want):
    return all(torch.equal(found.cpu(), wanted) for found, wanted in zip(got, want, strict=True))


def follow_the_definition(number, device):
    kind, similarity, size = KINDS[number % 5], SIMILARITIES[number % 3], SIZES[number % 4]
    problem = make(kind, 3, 260, 20, number, DTYPES[number % 2])
    form = ("ids", "mask", "list")[number // 3 % 3]
    include, named = make_include(260, size, form, number)
    exclude = make_exclude(3, 260, 12, number)
    scores = canonical(problem.queries, problem.items, similarity, 0.02)
    k = 1 + number % 4
    got = item_topk(
        problem.queries.to(device),
        problem.items.to(device),
        k,
        similarity=similarity,
        temperature=0.02,
        exclude=exclude.to(device),
        include=on(device, include),
        impl="triton",
    )
    want = sorted_topk(scores, k, without(named, 260, as_sets(exclude)))
    assert_same([x.cpu() for x in got], want)


@pytest.mark.parametrize("include", [[], [199, 0, 199], list(range(0, 200, 2))])
def test_nothing_and_more_than_there_are(include, device):
    problem = make("normal", 2, 200, 8, 1)
    given = problem.queries.to(device), problem.items.to(device)
    for k in (0, 2, 300):
        want = item_topk(problem.queries, problem.items, k, include=include, impl="reference")
        got = item_topk(*given, k, include=include, impl="triton")
        assert_same([x.cpu() for x in got], want)


@pytest.mark.parametrize(
    ("scan", "similarity"),
    [("none", "cosine"), ("none", "l2"), ("bf16", "dot"), ("int8", "cosine"), ("int8", "l2")],
)
def test_an_index_follows_the_definition(similarity, scan, device, monkeypatch):
    index = check_an_index(similarity, scan, device, monkeypatch)
    assert index.last_search.dense_rows == 0


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gathered_rows_of_an_index(similarity, device, monkeypatch, always_gathered):
    check_an_index(similarity, "int8", device, monkeypatch)


def check_an_index(similarity, scan, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setenv("R2EC_IMPL", "triton")
    problem = make("shared mean", 3, 290, 20, 2)
    index = ItemIndex(problem.items[:250].to(device), similarity=similarity, scan=scan)
    index.append(problem.items[250:].to(device))
    gone = torch.arange(0, 290, 7)
    index.remove(gone.to(device))
    index.write(torch.arange(1, 4, device=device), problem.items[:3].to(device))
    scores = canonical(problem.queries, index.items.cpu(), similarity, 1.0)
    exclude = make_exclude(3, 290, 9, 2)
    for size, form in ((3, "ids"), (60, "list"), (270, "mask")):
        include, named = make_include(290, size, form, size)
        hidden = without(named - set(gone.tolist()), 290, as_sets(exclude))
        for k in (60, 3):
            found = index.search(
                problem.queries.to(device),
                k,
                exclude=exclude.to(device),
                include=on(device, include),
            )
            assert_same([x.cpu() for x in found], sorted_topk(scores, k, hidden))
    return index


def test_few_rows_in_a_mask_are_listed_not_searched_for(device):
    """Fewer than k groups hold a row: all of those rows are candidates, and no other."""
    from r2ec_kernels._exact.table import Table
    from r2ec_kernels._scan.triton_queries import prepare_on_device
    from r2ec_kernels.topk.impl.triton import search
    from r2ec_kernels.topk.impl.triton.groups import scan_rows

    problem = make("normal", 2, 350, 20, 5)
    queries, items = problem.queries.to(device), problem.items.to(device)
    allowed = torch.zeros(350, dtype=torch.bool, device=device)
    allowed[torch.tensor([3, 4, 340], device=device)] = True
    query = prepare_on_device(queries, "dot", 1.0, items.dtype)
    table = Table(items, allowed=allowed)
    scores, ids, stats = search(scan_rows(items, "dot"), query, table, 5, None, "rows")
    want = item_topk(queries, items, 5, include=allowed, impl="reference")
    assert_same((scores, ids), want)
    # the group of two rows whole, the other row alone
    assert stats().dense_rows == 0 and stats().candidates_per_k == (32 + 1) / 5


def test_ids_are_checked_on_the_host_alone(device, monkeypatch):
    problem = make("normal", 2, 300, 8, 1)
    given = problem.queries.to(device), problem.items.to(device)
    with pytest.raises(ValueError, match="include: expected ids in 0..299, got values in 1..300"):
        item_topk(*given, 3, include=[1, 300], impl="triton")
    if device == "cuda":
        beyond = torch.tensor([1, 300, -4], device=device)
        got = item_topk(*given, 3, include=beyond, impl="triton")
        assert got.indices[:, 0].tolist() == [1, 1] and (got.indices[:, 1:] == -1).all()
        monkeypatch.setenv("R2EC_CHECK", "1")
        with pytest.raises(ValueError, match="include"):
            item_topk(*given, 3, include=beyond, impl="triton")

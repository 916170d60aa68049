"""Allow-lists of target_stats, on every path of a CPU: ranks exactly, against the definition."""

import math

import numpy as np
import pytest
import torch
from _support.search_cases import (
    INCLUDE_FORMS,
    KINDS,
    SIMILARITIES,
    as_sets,
    make,
    make_exclude,
    make_include,
    without,
)
from torch import library

from r2ec_kernels import ItemIndex, item_topk, target_stats
from r2ec_kernels._cpu import extension
from r2ec_kernels._exact import included
from r2ec_kernels._exact.scores import canonical_scores
from r2ec_kernels._scan import float32
from r2ec_kernels.rank.impl import common

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["gathered", "switched off"])
def way(request, monkeypatch):
    """Both ways to leave the other rows out, whatever the sizes, in blocks of 256 and 64 rows."""
    share = 1 if request.param == "gathered" else 1 << 40
    monkeypatch.setattr(included, "_GATHERED_SHARE", share)
    monkeypatch.setattr(float32, "_BLOCK", 1)
    monkeypatch.setattr(common, "MIN_BLOCK", 64)
    monkeypatch.setattr(common, "BLOCK_ELEMENTS", 1)


def expected(queries, items, targets, hidden, similarity, temperature):
    """Ranks and log-probabilities by numpy, of canonical scores; hidden: a set of ids a query."""
    scores = canonical_scores(queries, items, similarity, temperature).double().numpy()
    ranks, log_probs = [], []
    for row, target, left_out in zip(scores, targets.tolist(), hidden, strict=True):
        ids = np.array([i for i in range(len(row)) if i == target or i not in left_out])
        order = ids[np.argsort(-row[ids], kind="stable")]
        ranks.append(int(np.flatnonzero(order == target)[0]) + 1)
        with np.errstate(over="ignore"):
            log_probs.append(-np.log(np.exp(np.minimum(row[ids] - row[target], 700)).sum()))
    return ranks, np.array(log_probs)


def assert_as_expected(got, want):
    assert got.rank.tolist() == want[0]
    sure = want[1] > -690  # of which float64's exponentials do not overflow
    found = got.log_prob.numpy().astype(float)
    np.testing.assert_allclose(found[sure], want[1][sure], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_by_hand(impl):
    items = torch.tensor([[5.0], [1.0], [4.0], [4.0], [9.0], [2.0]]).log()
    queries, targets = torch.ones(3, 1), [3, 1, 4]
    # 4 of {4, 4, 2}; 1, which is not included, of {4, 4, 2, 1}; 9, excluded besides, of {4, 2, 9}
    got = target_stats(
        queries, items, targets, include=[5, 2, 3, 3], exclude=[[], [], [4, 2]], impl=impl
    )
    assert got.rank.tolist() == [2, 4, 1]
    want = torch.tensor([4 / 10, 1 / 11, 9 / 15])
    torch.testing.assert_close(got.log_prob.exp(), want)
    nothing = target_stats(queries, items, targets, include=[], impl=impl)
    assert nothing.rank.tolist() == [1, 1, 1] and nothing.log_prob.tolist() == [0, 0, 0]


def problem_of(number, similarity, count, batch):
    kind = sorted(set(KINDS) - {"huge", "wild scales"})[number % 13]
    problem = make(kind, batch, count, 12, number, DTYPES[number % 3])
    generator = torch.Generator().manual_seed(number)
    targets = torch.randint(0, count, (batch,), generator=generator)
    size = (0, 1, count // 12, count // 2, count)[number % 5]
    include, named = make_include(count, size, INCLUDE_FORMS[number // 5 % 5], number)
    exclude = make_exclude(batch, count, count // 9, number)
    exclude[0, 0] = targets[0]
    temperature = 0.2 if similarity == "cosine" else 3.0
    return problem, targets, include, named, exclude, temperature


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_ranks_follow_the_definition(similarity, part, way):
    # 2 ways x 3 similarities x 3 parts x 25 cases x (torch, compiled): 900 comparisons
    for number in range(part * 25, part * 25 + 25):
        batch, count = (5, 400) if number % 2 else (2, 90)
        case = problem_of(number, similarity, count, batch)
        problem, targets, include, named, exclude, temperature = case
        how = {"similarity": similarity, "temperature": temperature}
        given = problem.queries, problem.items, targets
        want = expected(*given, without(named, count, as_sets(exclude)), *how.values())
        for cpu in ("none", extension.cpu_kinds()[0]):
            with extension.use_cpu(cpu):
                got = target_stats(*given, **how, exclude=exclude, include=include)
            assert_as_expected(got, want)
        if number % 5 == 0:
            got = target_stats(*given, **how, exclude=exclude, include=include, impl="reference")
            assert_as_expected(got, want)


@pytest.mark.parametrize("scan", ["none", "fp16", "int8", "auto"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_an_index_follows_the_definition(similarity, scan, way):
    for number in range(15):
        case = problem_of(3 * number, similarity, 500, 4)  # a float32 table
        problem, targets, include, named, exclude, temperature = case
        how = {"similarity": similarity, "temperature": temperature}
        index = ItemIndex(problem.items[:400], scan=scan, **how)
        index.append(problem.items[400:])
        gone = set(range(number % 3, 500, 11)) - set(targets.tolist())
        index.remove(sorted(gone))
        index.write(targets[:1], problem.items[:1])
        hidden = [out | gone for out in without(named, 500, as_sets(exclude))]
        for use_scan in (True, False):
            got = index.target_stats(
                problem.queries, targets, exclude=exclude, include=include, use_scan=use_scan
            )
            given = problem.queries, index.items, targets, hidden
            assert_as_expected(got, expected(*given, *how.values()))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("size", [20, 150])
def test_scores_that_are_not_finite(impl, size, way):
    """Among what is included, NaN does not compete, and infinite scores share the mass."""
    items = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    items[5:12] = torch.nan
    items[12:15] = 3e38
    queries = torch.full((4, 4), 2.0)
    targets = torch.tensor([5, 12, 0, 7])
    for include in (torch.arange(size), torch.arange(15, size), torch.arange(6, size)):
        got = target_stats(queries, items, targets, include=include, impl=impl)
        named = set(include.tolist())
        among = {t: named | {t} for t in targets.tolist()}
        high = {t: len(among[t] & {12, 13, 14}) for t in among}
        assert got.rank[0] == len(among[5]) and got.rank[3] == len(among[7])
        assert got.rank[1] == 1 and got.log_prob[1] == pytest.approx(-math.log(high[12]))
        assert (got.log_prob[[0, 3]] == -math.inf).all()
        assert (got.log_prob[2] == -math.inf) == (high[0] > 0)


def test_ranks_are_places_in_the_search(way):
    problem = make("90% copies", 4, 300, 8, 1)
    include = torch.arange(0, 300, 4)
    found = item_topk(problem.queries, problem.items, 75, include=include).indices
    for place in (0, 7, 74):
        got = target_stats(problem.queries, problem.items, found[:, place], include=include)
        assert got.rank.tolist() == [place + 1] * 4


def test_bad_lists_are_named():
    queries, items = torch.zeros(2, 4), torch.ones(5, 4)
    index = ItemIndex(items)
    for include, words in (([5], "in 0..4, got values in 5..5"), (np.ones(4, bool), "mask of")):
        with pytest.raises(ValueError, match=f"include: expected .*{words}"):
            target_stats(queries, items, [0, 1], include=include)
        with pytest.raises(ValueError, match=f"include: expected .*{words}"):
            index.target_stats(queries, [0, 1], include=include)


def test_opcheck():
    problem = make("normal", 3, 500, 16, 7)
    for include in (torch.arange(0, 500, 9), torch.arange(500) % 2 == 0):
        given = problem.queries, problem.items, torch.tensor([4, 9, 14])
        library.opcheck(
            torch.ops.r2ec_kernels.target_stats.default,
            (*given, "dot", 0.5, None, None, include, "auto"),
        )

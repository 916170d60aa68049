"""The canonical score and order."""

import math

import pytest
import torch
from _support.search_cases import KINDS, SIMILARITIES, make

from r2ec_kernels._exact import scores
from r2ec_kernels._exact.scores import PADDING_KEY, canonical_scores, from_order_keys, order_keys


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"huge", "wild scales"}))
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_fast_products_equal_the_definition(kind, similarity):
    problem = make(kind, 6, 300, 33, 0)
    got = canonical_scores(problem.queries, problem.items, similarity, 0.02)
    query = problem.queries.double().repeat_interleave(300, 0)
    row = problem.items.double().repeat(6, 1)
    want = scores._defining_scores(query, row, similarity, 0.02).view(6, 300) + 0.0
    assert torch.equal(got, want)
    own = problem.items.expand(6, -1, -1).contiguous()
    assert torch.equal(canonical_scores(problem.queries, own, similarity, 0.02), want)


def test_definition_is_the_correctly_rounded_sum():
    problem = make("normal", 4, 50, 60, 1)
    got = canonical_scores(problem.queries, problem.items, "dot", 1.0)
    for b in range(4):
        for n in range(50):
            pairs = zip(problem.queries[b].tolist(), problem.items[n].tolist(), strict=True)
            assert got[b, n].item() == torch.tensor(math.fsum(q * x for q, x in pairs)).item()


def test_score_does_not_depend_on_the_batch():
    problem = make("small integers", 9, 700, 40, 2)
    whole = canonical_scores(problem.queries, problem.items, "cosine", 0.02)
    for b, n in ((0, 0), (8, 699), (4, 123)):
        one = canonical_scores(problem.queries[b : b + 1], problem.items[n : n + 1], "cosine", 0.02)
        assert torch.equal(one[0, 0], whole[b, n])


def test_zero_norm_and_signed_zero():
    queries = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    rows = torch.tensor([[0.0, 5.0], [0.0, 0.0], [-0.0, -1.0]])
    for similarity in ("dot", "cosine"):
        scores = canonical_scores(queries, rows, similarity, 1.0)
        assert (scores == 0).all() and not torch.signbit(scores).any()


def test_order_keys_sort_by_score_then_id():
    values = [float("inf"), 3.5, 1e-45, 0.0, -1e-45, -2.0, float("-inf")]
    scores = torch.tensor(values).repeat_interleave(2)
    ids = torch.tensor([0, 2**32 - 2]).repeat(len(values))
    keys = order_keys(scores, ids)
    assert (keys.diff() < 0).all() and (keys > PADDING_KEY).all()
    back_scores, back_ids = from_order_keys(keys)
    assert torch.equal(back_scores, scores) and torch.equal(back_ids, ids)
    score, number = from_order_keys(torch.tensor([PADDING_KEY]))
    assert score.item() == float("-inf") and number.item() == -1

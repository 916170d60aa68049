"""Search and rank of numbers that are not finite, by their kernels: on a GPU and in the
interpreter, against the definition."""

import pytest
import torch
from _support.non_finite_cases import WHERE, make, stats_by_definition, topk_by_definition
from _support.search_cases import SIMILARITIES

from r2ec_kernels import item_topk, target_stats

INTERPRETED_TYPES = ("float32", "bfloat16")  # here the kernels widen what they multiply
INTERPRETED_SHARE = 6
TARGETS = torch.tensor([7, 0, 40, 11, 99])
EXCLUDE = torch.tensor([[0, 7, 11], [11, -1, -1], [3, 3, 5], [-1] * 3, [20, 21, 20]])


@pytest.mark.parametrize("excluding", [False, True], ids=["all", "excluding"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("where", WHERE)
def test_the_kernels_follow_the_definition(where, similarity, excluding, device, dtype):
    queries, items = make(where, dtype, count=201, d=24)
    how = {"similarity": similarity, "temperature": 0.5}
    how["exclude"] = EXCLUDE if excluding else None
    wanted = topk_by_definition(queries, items, 2, **how)
    stats = stats_by_definition(queries, items, TARGETS, **how)
    if excluding:
        how["exclude"] = EXCLUDE.to(device)
    queries, items = queries.to(device), items.to(device)
    got = item_topk(queries, items, 2, impl="triton", **how)
    assert torch.equal(got.indices.cpu(), wanted[1]) and torch.equal(got.scores.cpu(), wanted[0])
    got = target_stats(queries, items, TARGETS.to(device), impl="triton", **how)
    assert torch.equal(got.rank.cpu(), stats[0])
    torch.testing.assert_close(got.log_prob.cpu(), stats[1], rtol=1e-5, atol=1e-4)

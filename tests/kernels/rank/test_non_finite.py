"""NaN and infinities in ranks, log-probabilities, rewards and advantages.

A competitor whose score is NaN does not compete. A target whose score is NaN has the last place,
the number of rows that are not excluded, and log-probability -inf. Items at +inf share the mass;
where all scores are -inf, all items do.
"""

import itertools
import math

import pytest
import torch
from _support.non_finite_cases import DTYPES, INF, NAN, WHERE, make, stats_by_definition
from _support.search_cases import SIMILARITIES

from r2ec_kernels import ItemIndex, item_topk, target_stats
from r2ec_kernels._cpu import extension

EXCLUDE = torch.tensor([[0, 7, 11], [11, -1, -1], [3, 3, 5], [-1] * 3, [20, 21, 20]])
TARGETS = (7, 0, 40, 11, 200)  # among them rows that hold NaN and infinity


def assert_stats(got, want, what):
    assert torch.equal(got[0], want[0]), (what, got[0], want[0])
    assert not got[1].isnan().any(), what
    torch.testing.assert_close(got[1], want[1], rtol=2e-6, atol=2e-5, msg=str(what))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_implementation_follows_the_definition(where, similarity, monkeypatch):
    for dtype, excluding, shift in itertools.product(DTYPES, (False, True), (0, 1, 2)):
        queries, items = make(where, dtype)
        targets = torch.tensor(TARGETS).roll(shift)
        exclude = EXCLUDE if excluding else None
        how = {"similarity": similarity, "temperature": 0.5, "exclude": exclude}
        want = stats_by_definition(queries, items, targets, **how)
        for impl in ("reference", "torch"):
            got = target_stats(queries, items, targets, impl=impl, **how)
            assert_stats(got, want, (impl, dtype, excluding, shift))
        with monkeypatch.context() as without:
            without.setattr(extension, "_native", None)
            got = target_stats(queries, items, targets, impl="torch", **how)
            assert_stats(got, want, ("torch alone", dtype, excluding, shift))


def test_a_nan_state_is_ranked_last():
    items = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    for state in (torch.full((1, 8), NAN), torch.tensor([[NAN] + [0.0] * 7])):
        for impl in ("torch", "reference"):
            rank, log_prob = target_stats(state, items, torch.tensor([3]), impl=impl)
            assert rank.tolist() == [100] and log_prob.tolist() == [-INF]
        history = torch.tensor([[5, 5, 9, 3, -1]])  # two rows beside the target itself
        rank, _ = target_stats(state, items, torch.tensor([3]), exclude=history)
        assert rank.tolist() == [98]
        index = ItemIndex(items)
        index.remove(torch.tensor([0, 1]))
        assert index.target_stats(state, torch.tensor([3])).rank.tolist() == [98]


@pytest.mark.parametrize("scan", ["none", "fp16", "bf16", "int8", "auto"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_an_index_ranks_any_query(scan, similarity):
    for where, use_scan in itertools.product(("queries", "overflow"), (True, False)):
        queries, items = make(where, torch.float32)
        how = {"similarity": similarity, "temperature": 0.5}
        index = ItemIndex(items, scan=scan, **how)
        targets = torch.tensor(TARGETS)
        want = stats_by_definition(queries, items, targets, exclude=EXCLUDE, **how)
        got = index.target_stats(queries, targets, exclude=EXCLUDE, use_scan=use_scan)
        assert torch.equal(got.rank, want[0])
        torch.testing.assert_close(got.log_prob, want[1], rtol=1e-4, atol=1e-3)


def test_scores_that_only_the_temperature_makes_infinite(monkeypatch):
    """Norms are ordinary: a coarse scan sees nothing, the canonical scores are infinite."""
    items = torch.tensor([[1.0], [2.0], [2.0], [-3.0], [0.5]])
    queries = torch.ones(5, 1)
    targets = torch.arange(5)
    for temperature in (1e-38, 2e-39, 1e-30, 1e-45, 0.75 * 2.0**-127):
        for factor in (1.0, -1.0):
            how = {"similarity": "dot", "temperature": temperature}
            given = (factor * queries, items, targets)
            want = stats_by_definition(*given, exclude=None, **how)
            for native in (extension._native, None):
                monkeypatch.setattr(extension, "_native", native)
                assert_stats(target_stats(*given, **how), want, temperature)


def test_infinite_scores_share_the_mass():
    items = torch.tensor([[INF], [1.0], [INF], [-INF], [NAN], [2.0]])
    queries = torch.tensor([[1.0], [-1.0]])
    rank, log_prob = target_stats(
        queries.repeat_interleave(6, 0), items, torch.arange(6).repeat(2), exclude=None
    )
    assert rank.tolist() == [1, 4, 2, 5, 6, 3] + [4, 2, 5, 1, 6, 3]
    half = -math.log(2)
    torch.testing.assert_close(log_prob[:6], torch.tensor([half, -INF, half, -INF, -INF, -INF]))
    torch.testing.assert_close(log_prob[6:], torch.tensor([-INF, -INF, -INF, 0.0, -INF, -INF]))
    lost = torch.full((4, 1), -INF)
    rank, log_prob = target_stats(torch.ones(4, 1), lost, torch.arange(4))
    assert rank.tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(log_prob, torch.full((4,), -math.log(4)))


def test_an_excluded_item_is_not_ahead_of_a_target_at_minus_infinity():
    items = torch.tensor([[-INF], [-INF], [1.0]])
    for impl in ("torch", "reference"):
        rank, log_prob = target_stats(
            torch.ones(1, 1), items, torch.tensor([1]), exclude=torch.tensor([[0]]), impl=impl
        )
        assert rank.tolist() == [2] and log_prob.tolist() == [-INF]


def test_ranks_are_places_in_the_search_of_all_items():
    """The rank of a target that can be compared is its place in ``item_topk(k=N)``."""
    for where in WHERE:
        queries, items = make(where, torch.float32)
        order = item_topk(queries, items, len(items)).indices
        targets = torch.where(order[:, 100] >= 0, order[:, 100], order[:, 0]).clamp_min(0)
        rank = target_stats(queries, items, targets).rank
        for b, target in enumerate(targets.tolist()):
            place = (order[b] == target).nonzero()
            assert rank[b] == (len(items) if not len(place) else int(place[0, 0]) + 1)

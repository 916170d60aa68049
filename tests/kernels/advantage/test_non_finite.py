"""Rewards of targets that cannot be compared, and rewards that differ by rounding alone."""

import itertools
import math

import pytest
import torch

from r2ec_kernels import grouped_advantage, recpo_reward, reward_and_advantage, target_stats
from r2ec_kernels.advantage.impl import reference

INF, NAN = float("inf"), float("nan")


def neighbours(value, ulps):
    """A float32 number and the one so many ulp above it."""
    bits = torch.tensor(value, dtype=torch.float32).view(torch.int32)
    return torch.stack([bits, bits + ulps]).view(torch.float32)


@pytest.mark.parametrize("log_prob", [NAN, -INF])
@pytest.mark.parametrize("weight", [0.0, 0.05, 1.0])
def test_a_target_that_cannot_be_compared_has_a_reward(log_prob, weight):
    rank = torch.tensor([[1, 999, 1000, 1001]])
    log_probs = torch.full((1, 4), log_prob)
    got = recpo_reward(rank, log_probs, softmax_weight=weight)
    gain = [1.0, 1 / math.log2(1000), 1 / math.log2(1001), 0.0]
    torch.testing.assert_close(got[0], (1 - weight) * torch.tensor(gain))
    torch.testing.assert_close(got, reference.recpo_reward(rank, log_probs, weight, 1000).float())


def test_no_reward_is_nan():
    for weight, value in itertools.product((0.0, 0.5, 1.0), (NAN, -NAN, INF, -INF, 1e4, -1e4)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            got = recpo_reward(
                torch.tensor([3]), torch.tensor([value], dtype=dtype), softmax_weight=weight
            )
            assert torch.isfinite(got).all(), (weight, value, dtype)


def test_a_nan_state_never_wins_its_group():
    """From the state to the advantage: the broken trajectory of a group is the worst one."""
    items = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    states = items[3] + 0.1 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    for broken in (NAN, INF):
        states[2, 0] = broken
        stats = target_stats(states, items, torch.full((4,), 3), similarity="cosine")
        assert stats.rank[2] == 50
        both = reward_and_advantage(stats.rank[None], stats.log_prob[None])
        assert torch.isfinite(both.advantages).all()
        assert both.advantages[0].argmin() == 2 and not both.best[0, 2]


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("value", [1.0, 0.95, 0.3, 1e-6, 1e-30, 123.0, -0.7])
def test_rewards_a_few_ulp_apart_are_tied(estimator, value):
    for ulps in (1, 2):
        pair = neighbours(value, ulps)
        for group in (pair, pair.flip(0), pair.repeat(4)):
            for dtype in (torch.float32, torch.float64):
                got = grouped_advantage(group[None].to(dtype), estimator=estimator)
                assert not got.advantages.any(), (ulps, got.advantages)
                right, _ = reference.grouped_advantage(group[None].to(dtype), estimator, 1)
                assert not right.any()
    apart = neighbours(value, 12)[None]
    assert grouped_advantage(apart, estimator=estimator).advantages.all()


def test_ties_by_rounding_in_rewards_themselves():
    """Log-probabilities one rounding apart, as two implementations or batches give them."""
    log_prob = torch.log(torch.tensor([[0.3, 0.3, 0.3, 0.3]]))
    log_prob[0, 1] = torch.nextafter(log_prob[0, 1], torch.tensor(0.0))
    log_prob[0, 2] = torch.nextafter(log_prob[0, 2], torch.tensor(-1e9))
    for rank in (1, 7, 2000):
        got = reward_and_advantage(torch.full((1, 4), rank), log_prob)
        assert not got.advantages.any(), rank


def test_the_best_of_tied_rewards_is_still_the_largest():
    got = grouped_advantage(neighbours(0.5, 1)[None])
    assert got.best.tolist() == [[False, True]]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rewards_that_are_not_finite_are_refused(value):
    for rewards in ([[1.0, value]], [[value, value]], [[0.5, 0.5], [value, 1.0]]):
        with pytest.raises(ValueError, match="rewards: expected finite"):
            grouped_advantage(torch.tensor(rewards))

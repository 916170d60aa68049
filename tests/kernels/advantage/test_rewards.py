"""recpo_reward and grouped_advantage against plain arithmetic."""

import math

import numpy as np
import pytest
import torch

from r2ec_kernels import grouped_advantage, recpo_reward
from r2ec_kernels.advantage.impl import reference


def test_reward_by_hand():
    rank = torch.tensor([[1, 2, 3], [1000, 1001, 10**6]])
    log_prob = torch.tensor([[0.0, -1.0, -50.0], [-2.0, -0.5, -1e4]])
    reward = recpo_reward(rank, log_prob)
    assert reward.dtype == torch.float32 and reward.shape == rank.shape
    for i in range(2):
        for j in range(3):
            r = int(rank[i, j])
            gain = 1 / math.log2(r + 1) if r <= 1000 else 0.0
            expected = 0.05 * math.exp(float(log_prob[i, j])) + 0.95 * gain
            assert float(reward[i, j]) == pytest.approx(expected, rel=1e-7)
    assert float(recpo_reward(rank, log_prob, softmax_weight=0.0, ndcg_k=2)[0, 2]) == 0
    assert float(recpo_reward(rank, log_prob, softmax_weight=1.0)[0, 0]) == 1


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("group", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_equal_the_reference(estimator, group, dtype):
    rng = np.random.default_rng(group)
    rewards = torch.from_numpy(rng.random((40, group))).to(dtype)
    rewards[3] = 0.1  # ties: exactly zero although 0.1 has no exact mean
    rewards[4, group // 2 :] = rewards[4, 0]
    rewards[5:20] = rewards[5:20].mul(3).round() / 3
    rewards[20] *= 1e-6
    for best in {1, group}:
        ours = grouped_advantage(rewards, estimator=estimator, best=best)
        advantages, chosen = reference.grouped_advantage(rewards, estimator, best)
        assert ours.advantages.dtype == dtype
        torch.testing.assert_close(ours.advantages, advantages.to(dtype), rtol=2e-6, atol=1e-12)
        assert torch.equal(ours.best, chosen)
        assert (ours.best.sum(1) == best).all()
    if group > 1:
        assert not ours.advantages[3].any()


def test_equal_rewards_mark_the_first():
    ours = grouped_advantage(torch.full((2, 4), 0.3), best=2)
    assert ours.best.tolist() == [[True, True, False, False]] * 2
    assert grouped_advantage(torch.tensor([[1.0, 3.0, 3.0]])).best.tolist() == [
        [False, True, False]
    ]


def test_advantages_use_the_unbiased_std_in_float64():
    rewards = torch.tensor([[1.0, 1.0 + 2**-20, 1.0]])
    values = rewards.double().numpy()[0]
    expected = (values - values.mean()) / (values.std(ddof=1) + 1e-8)
    ours = grouped_advantage(rewards).advantages[0].numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_empty():
    assert recpo_reward(torch.empty(0, dtype=torch.int64), torch.empty(0)).shape == (0,)
    assert grouped_advantage(torch.empty(0, 4)).advantages.shape == (0, 4)


@pytest.mark.parametrize(
    ("function", "error", "name"),
    [
        (lambda: recpo_reward(torch.ones(2), torch.ones(2)), TypeError, "rank"),
        (lambda: recpo_reward(torch.tensor([1]), torch.ones(2)), ValueError, "rank"),
        (lambda: recpo_reward(torch.tensor([1]), torch.ones(1), ndcg_k=0), ValueError, "ndcg_k"),
        (
            lambda: recpo_reward(torch.tensor([1]), torch.ones(1), softmax_weight=2),
            ValueError,
            "softmax_weight",
        ),
        (lambda: grouped_advantage(torch.ones(3)), ValueError, "rewards"),
        (lambda: grouped_advantage(torch.ones(3, 2), best=3), ValueError, "best"),
        (lambda: grouped_advantage(torch.ones(3, 2), estimator="x"), ValueError, "estimator"),
        (lambda: grouped_advantage(torch.ones(3, 2, dtype=torch.int64)), TypeError, "rewards"),
    ],
)
def test_bad_arguments_are_named(function, error, name):
    with pytest.raises(error, match=name):
        function()


def test_non_finite_rewards_are_reported():
    with pytest.raises(ValueError, match="rewards"):
        grouped_advantage(torch.tensor([[1.0, float("nan")]]))

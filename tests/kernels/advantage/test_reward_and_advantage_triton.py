"""reward_and_advantage by its Triton kernel: on a GPU and in Triton's interpreter."""

import pytest
import torch

from r2ec_kernels import grouped_advantage, recpo_reward, reward_and_advantage
from r2ec_kernels.advantage.api import advantages_of


def make(groups, group, device):
    generator = torch.Generator().manual_seed(group)
    rank = torch.randint(1, 1500, (groups, group), generator=generator)
    log_prob = -5 * torch.rand(groups, group, generator=generator)
    rank[0], log_prob[0] = 7, -1.0  # a tied group
    rank[-1, 0], log_prob[-1, 0] = 10**6, -1e4
    return rank.to(device), log_prob.to(device)


def check(rank, log_prob, **how):
    names = ("softmax_weight", "ndcg_k")
    reward = {name: how[name] for name in names if name in how}
    rest = {name: value for name, value in how.items() if name not in names}
    got = reward_and_advantage(rank, log_prob, impl="triton", **how)
    rewards = recpo_reward(rank, log_prob, **reward)
    torch.testing.assert_close(got.rewards, rewards, rtol=3e-7, atol=0)
    # of the kernel's own rewards: a rounding unit may order two that are equal
    want = grouped_advantage(got.rewards, **rest)
    torch.testing.assert_close(got.advantages, want.advantages, rtol=1e-4, atol=1e-6)
    assert torch.equal(got.best, want.best)
    return got


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize(
    ("groups", "group"),
    [
        (7, 1),
        (7, 2),
        (3, 5),
        (9, 8),
        (2, 33),
        *(pytest.param(*size, marks=pytest.mark.gpu) for size in [(5000, 16), (3, 100)]),
    ],
)
def test_equals_the_two_functions(groups, group, estimator, device):
    rank, log_prob = make(groups, group, device)
    for best in {1, (group + 1) // 2, group}:
        got = check(rank, log_prob, estimator=estimator, best=best)
        assert (got.best.sum(1) == best).all()
    if group > 1:
        assert not got.advantages[0].any()
    else:
        assert (got.advantages == 1).all()


@pytest.mark.parametrize(("weight", "ndcg_k"), [(0.0, 1), (1.0, 1000), (0.3, 10)])
def test_settings_of_the_reward(weight, ndcg_k, device):
    check(*make(6, 4, device), softmax_weight=weight, ndcg_k=ndcg_k)


def test_types_of_the_log_probabilities(device, dtype):
    rank, log_prob = make(6, 4, device)
    check(rank, log_prob.to(dtype))


def test_layouts_and_nothing(device):
    rank, log_prob = make(6, 4, device)
    want = reward_and_advantage(rank, log_prob, impl="triton")
    got = reward_and_advantage(rank.T.contiguous().T, log_prob.T.contiguous().T, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    empty = reward_and_advantage(rank[:0], log_prob[:0], impl="triton")
    assert empty.rewards.shape == empty.best.shape == (0, 4)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("shape", [(0, 3), (5, 1), (4, 2), (7, 5), (2, 33)])
def test_advantages_of_given_rewards(shape, estimator, device):
    rewards = torch.rand(shape, generator=torch.Generator().manual_seed(shape[1])).to(device)
    if shape[0]:
        rewards[0] = 0.25  # a tied group
        rewards[-1, : shape[1] // 2] = rewards[-1, 0]  # equal rewards: lower index first
    for best in {1, shape[1]}:
        for kind in (torch.float32, torch.float64, torch.bfloat16):
            given = rewards.to(kind)
            got = advantages_of(given, estimator, best, "triton")
            want = grouped_advantage(given, estimator=estimator, best=best)
            assert got.advantages.dtype == want.advantages.dtype and got.best.dtype == torch.bool
            torch.testing.assert_close(got.advantages, want.advantages, rtol=1e-6, atol=1e-7)
            assert torch.equal(got.best, want.best)

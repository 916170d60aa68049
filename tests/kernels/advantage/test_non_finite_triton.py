"""The reward kernel for NaN and for rewards apart by rounding: on a GPU and in the interpreter."""

import pytest
import torch

from r2ec_kernels import reward_and_advantage

INF, NAN = float("inf"), float("nan")


def near(step):
    """Log-probabilities of rewards that differ by rounding (step 0), or by a little more."""
    values = torch.log(torch.tensor(0.3)).repeat(4)
    values[1] = torch.nextafter(values[1], torch.tensor(0.0))
    return values - step * torch.arange(4)


CASES = {
    "some NaN": torch.tensor([NAN, -1.0, -INF, -2.0]),
    "NaN": torch.tensor([NAN, NAN, -INF, NAN]),
    "infinite": torch.tensor([INF, -1.0, 0.0, -0.5]),
    "one ulp apart": near(0.0),
    "a thousandth apart": near(1e-3),
    "impossible": torch.full((4,), -INF),
    "equal": torch.full((4,), -1.0),
}


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("case", CASES)
def test_rewards_are_those_of_torch(case, estimator, device):
    for rank in (torch.full((1, 4), 5000), torch.tensor([[900, 3, 1000, 3]])):
        given = rank.to(device), CASES[case][None].to(device)
        got = reward_and_advantage(*given, estimator=estimator, impl="triton")
        want = reward_and_advantage(*given, estimator=estimator, impl="torch")
        assert torch.isfinite(got.rewards).all()
        torch.testing.assert_close(got.rewards, want.rewards, rtol=3e-7, atol=0)
        torch.testing.assert_close(got.advantages, want.advantages, rtol=1e-4, atol=1e-6)
        assert torch.equal(got.best, want.best)

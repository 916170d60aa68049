"""Run with TRITON_INTERPRET=1: the reward kernel for NaN and for rewards apart by rounding."""

import itertools
import sys

import torch

from r2ec_kernels import reward_and_advantage

INF, NAN = float("inf"), float("nan")


def main():
    near = torch.log(torch.tensor(0.3)).repeat(4)
    near[1] = torch.nextafter(near[1], torch.tensor(0.0))
    logs = [
        torch.tensor([NAN, -1.0, -INF, -2.0]),
        torch.tensor([NAN, NAN, -INF, NAN]),
        torch.tensor([INF, -1.0, 0.0, -0.5]),
        near,
        near - 1e-3 * torch.arange(4),
        torch.full((4,), -INF),
        torch.full((4,), -1.0),
    ]
    cases = 0
    for log_prob, estimator in itertools.product(logs, ("grpo", "rloo")):
        for rank in (torch.full((1, 4), 5000), torch.tensor([[900, 3, 1000, 3]])):
            given = rank, log_prob[None]
            got = reward_and_advantage(*given, estimator=estimator, impl="triton")
            want = reward_and_advantage(*given, estimator=estimator, impl="torch")
            assert torch.isfinite(got.rewards).all()
            torch.testing.assert_close(got.rewards, want.rewards, rtol=3e-7, atol=0)
            torch.testing.assert_close(got.advantages, want.advantages, rtol=1e-4, atol=1e-6)
            assert torch.equal(got.best, want.best)
        cases += 1
    sys.stdout.write(f"cases {cases}\n")


if __name__ == "__main__":
    main()

"""The equations of reward and advantage, one trajectory after another."""

import torch

from ..._numbers import TIED


def recpo_reward(
    rank: torch.Tensor, log_prob: torch.Tensor, softmax_weight: float, ndcg_k: int
) -> torch.Tensor:
    """docs/method.md#reward: R = b R_c + (1 - b) R_d, in float64."""
    gain = torch.where(rank <= ndcg_k, 1 / torch.log2(rank.double() + 1), 0.0)
    # a target that cannot be compared has probability 0
    probability = log_prob.double().exp().nan_to_num(nan=0.0, posinf=1.0)
    return softmax_weight * probability + (1 - softmax_weight) * gain


def grouped_advantage(
    rewards: torch.Tensor, estimator: str, best: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages (float64) and the best trajectories of each group. Rewards that differ by their
    rounding alone are tied."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64, device=rewards.device)
    chosen = torch.zeros(rewards.shape, dtype=torch.bool, device=rewards.device)
    group = rewards.shape[1]
    for b in range(rewards.shape[0]):
        row = rewards[b].double()
        if group == 1:
            advantages[b] = 1.0
        elif row.max() - row.min() > TIED * row.abs().max():
            for i in range(group):
                if estimator == "grpo":
                    advantages[b, i] = (row[i] - row.mean()) / (row.std(unbiased=True) + 1e-8)
                else:
                    others = torch.cat([row[:i], row[i + 1 :]])
                    advantages[b, i] = row[i] - others.mean()
        chosen[b, torch.sort(row, descending=True, stable=True).indices[:best]] = True
    return advantages, chosen

"""Rewards and advantages in plain torch, in float64."""

import torch

from ..._numbers import TIED


def recpo_reward(
    rank: torch.Tensor, log_prob: torch.Tensor, softmax_weight: float, ndcg_k: int
) -> torch.Tensor:
    gain = torch.where(rank <= ndcg_k, torch.log2(rank.double() + 1).reciprocal(), 0.0)
    # NaN, of a target that cannot be compared: probability 0
    probability = log_prob.double().exp().nan_to_num_(nan=0.0, posinf=1.0)
    return softmax_weight * probability + (1 - softmax_weight) * gain


def grouped_advantage(
    rewards: torch.Tensor, estimator: str, best: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages (float64) and best trajectories of [B, G] rewards."""
    group = rewards.shape[1]
    values = rewards.double()
    order = torch.sort(values, dim=1, descending=True, stable=True).indices
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order[:, :best], True)
    if group == 1:
        return torch.ones_like(values), chosen
    centred = values - values.mean(1, keepdim=True)
    if estimator == "grpo":
        variance = centred.square().sum(1, keepdim=True) / (group - 1)
        advantages = centred / (variance.sqrt() + 1e-8)
    else:
        advantages = centred * (group / (group - 1))
    high, low = values.amax(1, keepdim=True), values.amin(1, keepdim=True)
    tied = high - low <= TIED * torch.maximum(high, -low)
    return advantages.masked_fill(tied, 0.0), chosen

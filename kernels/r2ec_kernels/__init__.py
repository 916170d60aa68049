"""Kernels of R2ec for any PyTorch project: item search, rewards and the RecPO loss."""

from .policy.api import linear_logprob, recpo_loss
from .policy.config import LogProb, RecPOLoss, RecPOLossConfig
from .reward.api import Advantages, TargetStats, grouped_advantage, recpo_reward, target_stats

__all__ = [
    "Advantages",
    "LogProb",
    "RecPOLoss",
    "RecPOLossConfig",
    "TargetStats",
    "grouped_advantage",
    "linear_logprob",
    "recpo_loss",
    "recpo_reward",
    "target_stats",
]

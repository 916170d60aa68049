"""Exact item search, RecPO rewards and policy losses on torch, with Triton kernels on GPUs."""

from . import ops as ops  # registers the ops with torch
from .policy.api import LogProb, RecPOLoss, linear_logprob, recpo_loss
from .policy.config import RecPOLossConfig
from .reward.api import (
    Advantages,
    RewardedGroups,
    TargetStats,
    grouped_advantage,
    recpo_reward,
    reward_and_advantage,
    target_stats,
)
from .search.api import TopK, item_topk, sharded_topk
from .search.engine import SearchStats
from .search.index import ItemIndex

__all__ = [
    "Advantages",
    "ItemIndex",
    "LogProb",
    "RecPOLoss",
    "RecPOLossConfig",
    "RewardedGroups",
    "SearchStats",
    "TargetStats",
    "TopK",
    "grouped_advantage",
    "item_topk",
    "linear_logprob",
    "recpo_loss",
    "recpo_reward",
    "reward_and_advantage",
    "sharded_topk",
    "target_stats",
]

"""Exact item search, RecPO rewards and policy losses on torch, with Triton kernels on GPUs."""

from . import ops as ops  # registers the ops with torch
from ._version import __version__ as __version__
from .advantage.api import (
    Advantages,
    RewardedGroups,
    grouped_advantage,
    recpo_reward,
    reward_and_advantage,
)
from .index.index import ItemIndex
from .index.live import LiveIndex
from .logprob.api import linear_logprob
from .logprob.impl.common import LogProb
from .loss.api import recpo_loss
from .loss.config import RecPOLoss, RecPOLossConfig
from .rank.api import TargetStats, sharded_target_stats, target_stats
from .topk.api import TopK, item_topk, merge_topk, sharded_topk
from .topk.impl.common import SearchStats

__all__ = [
    "Advantages",
    "ItemIndex",
    "LiveIndex",
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
    "merge_topk",
    "recpo_loss",
    "recpo_reward",
    "reward_and_advantage",
    "sharded_target_stats",
    "sharded_topk",
    "target_stats",
]

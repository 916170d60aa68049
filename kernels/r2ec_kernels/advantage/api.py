"""RecPO's reward of a rank and a probability, and the advantages of a group of rewards."""

from typing import NamedTuple

import torch

from .. import _checks
from .._checks import as_int, as_number, check_dense
from .._dispatch import resolve
from .impl import torch as torch_impl

_FUSED = frozenset({"triton", "torch"})  # implementations of reward_and_advantage


class Advantages(NamedTuple):
    """What :func:`grouped_advantage` returns."""

    advantages: torch.Tensor  # [B, G]
    best: torch.Tensor  # bool [B, G]


class RewardedGroups(NamedTuple):
    """What :func:`reward_and_advantage` returns."""

    rewards: torch.Tensor  # [B, G]
    advantages: torch.Tensor  # [B, G]
    best: torch.Tensor  # bool [B, G]


def recpo_reward(
    rank: torch.Tensor,
    log_prob: torch.Tensor,
    *,
    softmax_weight: float = 0.05,
    ndcg_k: int = 1000,
) -> torch.Tensor:
    """RecPO's reward: probability of the target and its gain at its rank (docs/method.md#reward).

    Equal to ``softmax_weight * exp(log_prob) + (1 - softmax_weight) * ndcg`` with
    ``ndcg = 1 / log2(rank + 1) if rank <= ndcg_k else 0``.

    Args:
        rank: int64, any shape, from 1.
        log_prob: the same shape. NaN counts as probability 0, as -inf does: a target that cannot be
            compared (``target_stats``) has a reward, never NaN.
        softmax_weight: in 0..1.
        ndcg_k: ranks beyond it earn nothing.

    Returns:
        float32, the shape of ``rank`` (float64 for float64 log-probabilities).
    """
    ndcg_k = _check_reward(rank, log_prob, softmax_weight, ndcg_k)
    reward = torch_impl.recpo_reward(rank, log_prob, softmax_weight, ndcg_k)
    return reward.to(torch.promote_types(log_prob.dtype, torch.float32))


def grouped_advantage(
    rewards: torch.Tensor, *, estimator: str = "grpo", best: int = 1
) -> Advantages:
    """Advantage of each trajectory within its group, and the group's best trajectories.

    "grpo": ``(R - mean) / (std + 1e-8)`` with the unbiased std. "rloo": ``R`` minus the mean of
    the other G - 1 rewards. Both in float64. A group whose rewards are all equal gets exactly 0,
    and so does one whose largest and smallest reward differ by at most 2^-21 (4 ulp of float32) of
    the largest magnitude: that is rounding, which the division would blow up to advantages of order
    1.
    A group of one gets 1.

    Args:
        rewards: [B, G], finite; checked on CPUs, elsewhere under ``R2EC_CHECK=1``.
        estimator: "grpo" or "rloo".
        best: how many trajectories of each group are marked; equal rewards: lower index first.

    Returns:
        ``Advantages(advantages [B, G], best bool [B, G])``; float32, or float64 for float64.
    """
    return advantages_of(rewards, estimator, best, "torch")


def advantages_of(rewards: torch.Tensor, estimator: str, best: int, impl: str) -> Advantages:
    """As :func:`grouped_advantage`; ``impl`` "triton" is one launch."""
    check_dense("rewards", rewards)
    if not rewards.is_floating_point():
        raise TypeError(f"rewards: expected floats, got {rewards.dtype}")
    best = _check_groups("rewards", rewards, estimator, best)
    if _checks.reads_values(rewards) and not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards: expected finite numbers, got NaN or infinity")
    if impl == "triton":
        from .impl import triton as triton_impl

        return Advantages(*triton_impl.grouped_advantage(rewards, estimator, best))
    advantages, chosen = torch_impl.grouped_advantage(rewards, estimator, best)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    return Advantages(advantages.to(dtype), chosen)


def reward_and_advantage(
    rank: torch.Tensor,
    log_prob: torch.Tensor,
    *,
    softmax_weight: float = 0.05,
    ndcg_k: int = 1000,
    estimator: str = "grpo",
    best: int = 1,
    impl: str = "auto",
) -> RewardedGroups:
    """``recpo_reward`` and ``grouped_advantage`` of its result; one kernel launch on GPUs.

    Args:
        rank: int64 [B, G].
        log_prob: [B, G].
        softmax_weight, ndcg_k: see :func:`recpo_reward`.
        estimator, best: see :func:`grouped_advantage`.
        impl: "auto", "triton" or "torch".

    Returns:
        ``RewardedGroups(rewards [B, G], advantages [B, G], best bool [B, G])``.
    """
    check_dense("rank", rank)
    if resolve(impl, rank.device, "reward_and_advantage", _FUSED) == "torch":
        rewards = recpo_reward(rank, log_prob, softmax_weight=softmax_weight, ndcg_k=ndcg_k)
        return RewardedGroups(rewards, *grouped_advantage(rewards, estimator=estimator, best=best))
    ndcg_k = _check_reward(rank, log_prob, softmax_weight, ndcg_k)
    best = _check_groups("rank", rank, estimator, best)
    from .impl import triton as triton_impl

    return RewardedGroups(
        *triton_impl.reward_and_advantage(rank, log_prob, softmax_weight, ndcg_k, estimator, best)
    )


def _check_reward(
    rank: torch.Tensor, log_prob: torch.Tensor, softmax_weight: float, ndcg_k: int
) -> int:
    """Raise unless these are the arguments of a reward; returns ``ndcg_k`` as an int."""
    check_dense("rank", rank)
    check_dense("log_prob", log_prob)
    if rank.shape != log_prob.shape:
        raise ValueError(
            f"rank and log_prob: expected one shape, got {list(rank.shape)} and "
            f"{list(log_prob.shape)}"
        )
    if rank.is_floating_point() or rank.dtype == torch.bool or not log_prob.is_floating_point():
        raise TypeError(
            f"rank and log_prob: expected integers and floats, got {rank.dtype}, {log_prob.dtype}"
        )
    if not 0 <= as_number("softmax_weight", softmax_weight) <= 1:
        raise ValueError(f"softmax_weight: expected a number in 0..1, got {softmax_weight}")
    return as_int("ndcg_k", ndcg_k, 1)


def _check_groups(name: str, groups: torch.Tensor, estimator: str, best: int) -> int:
    """Raise unless ``groups`` is [B, G] and the settings fit; returns ``best`` as an int."""
    if groups.dim() != 2 or groups.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [B, G], G >= 1, got {list(groups.shape)}")
    if estimator not in ("grpo", "rloo"):
        raise ValueError(f"estimator: expected 'grpo' or 'rloo', got {estimator!r}")
    best = as_int("best", best, 0)
    if not 1 <= best <= groups.shape[1]:
        raise ValueError(f"best: expected 1..{groups.shape[1]} (the group), got {best}")
    return best

"""Ranks and log-probabilities to rewards and advantages in one kernel, and given rewards to
advantages in another.

For each group of G trajectories, with w the softmax weight and ndcg(r) = 1 / log2(r + 1) up to
rank ndcg_k and 0 beyond,

    R = w exp(log_prob) + (1 - w) ndcg(rank)
    A = (R - mean R) / (std R + 1e-8)  ("grpo"),  (R - mean R) G / (G - 1)  ("rloo")

and marks the BEST largest R; equal rewards mark the lower index. Rewards within TIED of the largest
magnitude differ by rounding alone and give A = 0. A log_prob that is NaN has probability 0.

Grid: one program of one warp a group. Tile: [BLOCK_G], G rounded up to a power of two; the order of
the rewards is counted in [BLOCK_G, BLOCK_G]. Reads 12 bytes a trajectory, writes 9. FLOPs: tens a
trajectory: the launch is the cost. From given rewards 4 bytes read, 5 written. Numerics: float64, R
and A rounded once to float32.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from ..._numbers import TIED


@triton.jit
def _advantages(b_value, o_g, m_g, BEST: tl.constexpr, RLOO: tl.constexpr, TIES: tl.constexpr):
    """Advantages of one group's rewards, float64 [BLOCK_G], and which of them are the best."""
    total = tl.sum(m_g.to(tl.float64), axis=0)
    mean = tl.sum(tl.where(m_g, b_value, 0.0), axis=0) / total
    b_centred = tl.where(m_g, b_value - mean, 0.0)
    others = tl.maximum(total - 1.0, 1.0)
    if RLOO:
        b_advantage = b_centred * (total / others)
    else:
        b_advantage = b_centred / (tl.sqrt(tl.sum(b_centred * b_centred, axis=0) / others) + 1e-8)
    high = tl.max(tl.where(m_g, b_value, -float("inf")), axis=0)
    low = tl.min(tl.where(m_g, b_value, float("inf")), axis=0)
    tied = high - low <= TIES * tl.maximum(high, -low)
    b_advantage = tl.where(tied, 0.0, b_advantage)
    b_advantage = tl.where(total == 1.0, 1.0, b_advantage)
    # [BLOCK_G, BLOCK_G]: who is ahead of whom, equal rewards lower index first
    m_ahead = (b_value[None, :] > b_value[:, None]) | (
        (b_value[None, :] == b_value[:, None]) & (o_g[None, :] < o_g[:, None])
    )
    b_place = tl.sum((m_ahead & m_g[None, :]).to(tl.int32), axis=1)
    return b_advantage, b_place < BEST


@triton.jit
def _reward_kernel(
    rank_ptr,
    log_prob_ptr,
    reward_ptr,
    advantage_ptr,
    best_ptr,
    group,
    softmax_weight,
    ndcg_k,
    BEST: tl.constexpr,
    RLOO: tl.constexpr,
    TIES: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One group. All arrays are [B, G], contiguous."""
    i_b = tl.program_id(0).to(tl.int64)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < group
    # [BLOCK_G]
    b_rank = tl.load(rank_ptr + i_b * group + o_g, mask=m_g, other=1)
    b_log_prob = tl.load(log_prob_ptr + i_b * group + o_g, mask=m_g, other=0.0).to(tl.float64)
    b_gain = tl.where(b_rank <= ndcg_k, 1.0 / tl.log2(b_rank.to(tl.float64) + 1.0), 0.0)
    b_p = tl.exp(b_log_prob)
    b_p = tl.where(b_p == b_p, b_p, 0.0)
    b_p = tl.where(b_p == float("inf"), 1.0, b_p)
    b_reward = softmax_weight * b_p + (1.0 - softmax_weight) * b_gain
    b_reward = b_reward.to(tl.float32)
    tl.store(reward_ptr + i_b * group + o_g, b_reward, mask=m_g)

    b_advantage, m_best = _advantages(b_reward.to(tl.float64), o_g, m_g, BEST, RLOO, TIES)
    tl.store(advantage_ptr + i_b * group + o_g, b_advantage.to(tl.float32), mask=m_g)
    tl.store(best_ptr + i_b * group + o_g, m_best.to(tl.int8), mask=m_g)


@triton.jit
def _advantage_kernel(
    reward_ptr,
    advantage_ptr,
    best_ptr,
    group,
    BEST: tl.constexpr,
    RLOO: tl.constexpr,
    TIES: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One group of given rewards. All arrays are [B, G], contiguous."""
    i_b = tl.program_id(0).to(tl.int64)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < group
    # [BLOCK_G]
    b_value = tl.load(reward_ptr + i_b * group + o_g, mask=m_g, other=0.0).to(tl.float64)
    b_advantage, m_best = _advantages(b_value, o_g, m_g, BEST, RLOO, TIES)
    b_advantage = b_advantage.to(advantage_ptr.dtype.element_ty)
    tl.store(advantage_ptr + i_b * group + o_g, b_advantage, mask=m_g)
    tl.store(best_ptr + i_b * group + o_g, m_best.to(tl.int8), mask=m_g)


def reward_and_advantage(
    rank: torch.Tensor,
    log_prob: torch.Tensor,
    softmax_weight: float,
    ndcg_k: int,
    estimator: str,
    best: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards and advantages float32 [B, G], best bool [B, G], in one launch."""
    groups, group = rank.shape
    reward, advantage = torch.empty(2, groups, group, device=rank.device)
    chosen = torch.empty(groups, group, dtype=torch.bool, device=rank.device)
    if groups:
        _reward_kernel[(groups,)](
            rank_ptr=rank.contiguous(),
            log_prob_ptr=log_prob.float().contiguous(),
            reward_ptr=reward,
            advantage_ptr=advantage,
            best_ptr=chosen.view(torch.int8),
            group=group,
            softmax_weight=softmax_weight,
            ndcg_k=ndcg_k,
            BEST=best,
            RLOO=estimator == "rloo",
            TIES=TIED,
            BLOCK_G=max(2, triton.next_power_of_2(group)),
            num_warps=1,
        )
    return reward, advantage, chosen


def grouped_advantage(
    rewards: torch.Tensor, estimator: str, best: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages [B, G] in the type of the rewards, at least float32, and best bool [B, G], in one
    launch."""
    groups, group = rewards.shape
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    advantage = torch.empty(groups, group, dtype=dtype, device=rewards.device)
    chosen = torch.empty(groups, group, dtype=torch.bool, device=rewards.device)
    if groups:
        _advantage_kernel[(groups,)](
            reward_ptr=rewards.contiguous(),
            advantage_ptr=advantage,
            best_ptr=chosen.view(torch.int8),
            group=group,
            BEST=best,
            RLOO=estimator == "rloo",
            TIES=TIED,
            BLOCK_G=max(2, triton.next_power_of_2(group)),
            num_warps=1,
        )
    return advantage, chosen


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ships, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    kinds = {"rank_ptr": "*i64", "best_ptr": "*i8", "softmax_weight": "fp32"}
    # bytes of a trajectory, read and written, and instructions: 4% above what sm_90 holds
    kernels = ((_reward_kernel, 12 + 9, 1040), (_advantage_kernel, 4 + 5, 307))
    found = []
    for rloo, (kernel, moved, instructions) in itertools.product((False, True), kernels):
        constants = {"BEST": 1, "RLOO": rloo, "TIES": TIED, "BLOCK_G": 8}
        signature = {}
        for name in kernel.arg_names:
            kind = "*fp32" if name.endswith("_ptr") else "i32"
            signature[name] = "constexpr" if name in constants else kinds.get(name, kind)
        found.append(
            {
                "name": f"advantage.{kernel.fn.__name__.strip('_')}",
                "kernel": kernel,
                "signature": signature,
                "constexprs": constants,
                "num_warps": 1,
                "num_stages": 1,
                "uses_tensor_cores": False,
                "work": {"sizes": "G=8", "bytes": 8 * moved, "flops": 0, "straight": True},
                "budget": {"loop": instructions},
            }
        )
    return found

"""RecPO's objective on top of log-probabilities: vectors of tokens and of trajectories only."""

from typing import NamedTuple

import torch

from ..config import RecPOLossConfig
from .common import (
    Actions,
    Normalizers,
    Outcome,
    StepCounts,
    StoredLogProbs,
    bounded,
    corrects_tokens,
    normalizers,
)


class TokenTerm(NamedTuple):
    loss: torch.Tensor  # scalar
    ratio: torch.Tensor  # [T], 0 where not counted
    importance: torch.Tensor | None  # [T], or [R] in the sequence modes
    kl: torch.Tensor | None  # [T], 0 where not counted
    actions: torch.Tensor  # [R], what one action of each trajectory weighs


class ItemTerm(NamedTuple):
    loss: torch.Tensor  # scalar
    ratio: torch.Tensor  # [R], 1 where not selected


def objective(
    log_prob: torch.Tensor,
    entropy: torch.Tensor | None,
    item_log_prob: torch.Tensor,
    actions: Actions,
    counts: StepCounts,
    config: RecPOLossConfig,
) -> tuple[torch.Tensor, Outcome]:
    """(loss [], what it consists of), from log-probabilities [T] and of the item actions [R]."""
    counted = actions.targets >= 0
    num_tokens = counted.sum()
    step = normalizers(counts, num_tokens, item_log_prob.shape[0], config)
    advantages = actions.advantages.to(log_prob.dtype)
    stored = actions.stored.constants(log_prob.dtype)
    token = token_term(log_prob, counted, actions.trajectory, advantages, stored, step, config)
    old = actions.old_items
    if old is not None:
        old = old.to(item_log_prob.dtype)
    item = item_term(item_log_prob, old, advantages, actions.best, token.actions, config)
    loss = token.loss + config.item_weight * item.loss
    return loss, _outcome(token, item, entropy, advantages, counted, num_tokens, actions, config)


def sum_by_trajectory(values: torch.Tensor, trajectory: torch.Tensor, num: int) -> torch.Tensor:
    """[T] -> [num], deterministic under torch.use_deterministic_algorithms."""
    return values.new_zeros(num).index_add(0, trajectory, values)


def clipped(ratio: torch.Tensor, advantage: torch.Tensor, config: RecPOLossConfig) -> torch.Tensor:
    """min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), docs/method.md#clip."""
    low, high = 1 - config.epsilon, 1 + config.epsilon_high
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def action_weights(
    lengths: torch.Tensor, step: Normalizers, config: RecPOLossConfig
) -> torch.Tensor:
    """What one action of each trajectory weighs in the loss, [R]: any of its tokens, and its item
    action, which is one more of them (docs/method.md#reductions).

    ``lengths`` [R] are the counted tokens of each trajectory.
    """
    if config.reduction == "token":
        return torch.ones_like(lengths) / step.tokens
    if config.reduction == "sequence":
        return 1 / (lengths.clamp(min=1) * step.trajectories)
    if config.reduction == "constant":
        assert config.max_completion_length is not None  # the config asks for it
        return torch.ones_like(lengths) / (step.trajectories * config.max_completion_length)
    return torch.ones_like(lengths) / step.trajectories


def token_term(
    log_prob: torch.Tensor,
    counted: torch.Tensor,
    trajectory: torch.Tensor,
    advantages: torch.Tensor,
    stored: StoredLogProbs,
    step: Normalizers,
    config: RecPOLossConfig,
) -> TokenTerm:
    """Loss of the reasoning tokens, one advantage per trajectory.

    Args:
        log_prob: [T].
        counted: bool [T].
        trajectory: int64 [T], in 0..R-1.
        advantages: [R].
    """
    num = advantages.shape[0]
    weight = counted.to(log_prob.dtype)
    lengths = sum_by_trajectory(weight, trajectory, num)
    actions = action_weights(lengths, step, config)
    old = log_prob.detach() if stored.old is None else stored.old
    log_ratio = torch.where(counted, log_prob - old, 0.0)
    if config.ratio_level == "sequence":
        mean = sum_by_trajectory(log_ratio, trajectory, num) / lengths.clamp(min=1)
        log_ratio = torch.where(counted, mean[trajectory], 0.0)
    ratio = log_ratio.exp()
    loss = -clipped(ratio, advantages[trajectory], config)
    importance = None
    if stored.sampler is not None:
        importance = importance_ratios(old - stored.sampler, counted, trajectory, num, config)
        loss = loss * (importance if corrects_tokens(config) else importance[trajectory])
    kl = None
    if stored.ref is not None:
        gap = torch.where(counted, stored.ref - log_prob, 0.0)
        kl = gap.exp() - gap - 1
        if config.kl_weight:
            loss = loss + config.kl_weight * kl
    total = (loss * weight * actions[trajectory]).sum()
    return TokenTerm(total, ratio.detach() * counted, importance, kl, actions)


def importance_ratios(
    difference: torch.Tensor,
    counted: torch.Tensor,
    trajectory: torch.Tensor,
    num: int,
    config: RecPOLossConfig,
) -> torch.Tensor:
    """Corrections for the sampler's numerics: [T], or [num] in the sequence modes.

    ``difference`` [T] is the old log-probability minus the sampler's; NaN where that has none.
    """
    known = torch.where(counted & ~difference.isnan(), difference, 0.0)
    if not corrects_tokens(config):
        known = sum_by_trajectory(known, trajectory, num)
    return bounded(known.exp(), config)


def item_term(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor | None,
    advantages: torch.Tensor,
    best: torch.Tensor,
    actions: torch.Tensor,
    config: RecPOLossConfig,
) -> ItemTerm:
    """Loss of the item actions, each the last action of its trajectory.

    Args:
        log_prob: [R], of the target among its candidates.
        old_log_prob: [R] or None.
        advantages: [R].
        best: bool [R], the trajectories that train.
        actions: [R], what one action of each trajectory weighs.
    """
    old = log_prob.detach() if old_log_prob is None else old_log_prob
    ratio = torch.where(best, log_prob - old, 0.0).exp()
    loss = torch.where(best, -clipped(ratio, advantages.to(ratio.dtype), config), 0.0)
    return ItemTerm((loss * actions.to(loss.dtype)).sum(), ratio.detach())


def _outcome(
    token: TokenTerm,
    item: ItemTerm,
    entropy: torch.Tensor | None,
    advantages: torch.Tensor,
    counted: torch.Tensor,
    num_tokens: torch.Tensor,
    actions: Actions,
    config: RecPOLossConfig,
) -> Outcome:
    low, high = _clip_fractions(token.ratio, advantages[actions.trajectory], counted, config)
    item_low, item_high = _clip_fractions(item.ratio, advantages, actions.best, config)
    correction: tuple[torch.Tensor | None, ...] = (None, None, None)
    if token.importance is not None:
        every = torch.ones_like(token.importance, dtype=torch.bool)
        correction = spread(token.importance, counted if corrects_tokens(config) else every)
    return Outcome(
        token_loss=token.loss.detach(),
        item_loss=item.loss.detach(),
        num_tokens=num_tokens,
        clip_fraction=low + high,
        clip_fraction_low=low,
        clip_fraction_high=high,
        item_clip_fraction=item_low + item_high,
        ratio=mean(token.ratio, counted),
        importance_ratio=correction[0],
        importance_ratio_min=correction[1],
        importance_ratio_max=correction[2],
        kl=None if token.kl is None else mean(token.kl, counted),
        entropy=None if entropy is None else mean(entropy, counted),
    )


def mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean over the counted entries, 0 if there are none; the others hold 0."""
    return values.detach().sum() / counted.sum().clamp(min=1)


def spread(
    values: torch.Tensor, among: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, smallest, largest) of the entries that ``among`` marks; 0 where there are none."""
    if not values.numel():
        return (values.new_zeros(()),) * 3
    some = among.any()
    low = torch.where(among, values, torch.inf).amin()
    high = torch.where(among, values, -torch.inf).amax()
    middle = mean(torch.where(among, values, 0.0), among)
    return middle, torch.where(some, low, 0.0), torch.where(some, high, 0.0)


def _clip_fractions(
    ratio: torch.Tensor, advantages: torch.Tensor, counted: torch.Tensor, config: RecPOLossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of the counted entries whose gradient the clip stops: (low, high)."""
    low = (ratio < 1 - config.epsilon) & (advantages < 0) & counted
    high = (ratio > 1 + config.epsilon_high) & (advantages > 0) & counted
    return mean(low.to(ratio.dtype), counted), mean(high.to(ratio.dtype), counted)

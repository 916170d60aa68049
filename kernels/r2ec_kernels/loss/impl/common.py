"""What the implementations of the objective share: their arguments, results, and small steps."""

from typing import NamedTuple

import torch

from ..config import RecPOLossConfig


class StoredLogProbs(NamedTuple):
    """Constants [T] that came with the tokens; None where not given."""

    old: torch.Tensor | None  # when they were sampled
    sampler: torch.Tensor | None  # of a sampler with other numerics
    ref: torch.Tensor | None  # of the reference model

    def constants(self, dtype: torch.dtype) -> "StoredLogProbs":
        """Detached, in ``dtype``."""
        return StoredLogProbs(
            *(None if value is None else value.detach().to(dtype) for value in self)
        )


class Actions(NamedTuple):
    """The T tokens and R trajectories of a call, all constants."""

    targets: torch.Tensor  # int64 [T], negative where not counted
    trajectory: torch.Tensor  # int64 [T], in 0..R-1
    advantages: torch.Tensor  # [R]
    best: torch.Tensor  # bool [R], the trajectories that train the item action
    old_items: (
        torch.Tensor | None
    )  # [R], log-probabilities of the item actions when they were taken
    stored: StoredLogProbs


class StepCounts(NamedTuple):
    """Counts of the whole optimiser step, over all calls and ranks; None: of this call."""

    tokens: float | torch.Tensor | None
    selected: float | torch.Tensor | None  # trajectories that train the item action
    group: int  # trajectories of a group


class Normalizers(NamedTuple):
    """What sums are divided by: counts of the optimiser step, at least 1."""

    tokens: float | torch.Tensor
    trajectories: float | torch.Tensor


class Outcome(NamedTuple):
    """What a loss consists of: the fields of ``RecPOLoss`` of the same names, detached scalars."""

    token_loss: torch.Tensor
    item_loss: torch.Tensor
    num_tokens: torch.Tensor
    clip_fraction: torch.Tensor
    clip_fraction_low: torch.Tensor
    clip_fraction_high: torch.Tensor
    item_clip_fraction: torch.Tensor
    ratio: torch.Tensor
    importance_ratio: torch.Tensor | None
    importance_ratio_min: torch.Tensor | None
    importance_ratio_max: torch.Tensor | None
    kl: torch.Tensor | None
    entropy: torch.Tensor | None


def normalizers(
    counts: StepCounts, local_tokens: torch.Tensor, rows: int, config: RecPOLossConfig
) -> Normalizers:
    """Those of the optimiser step; what they divide is 0 where a count is 0. Counts that are
    tensors stay on their device, unread."""
    trajectories: float | torch.Tensor = max(1, rows)
    if counts.selected is not None:
        trajectories = _at_least_one(counts.selected) * per_selected(counts, config)
    tokens = local_tokens if counts.tokens is None else counts.tokens
    return Normalizers(_at_least_one(tokens), trajectories)


def per_selected(counts: StepCounts, config: RecPOLossConfig) -> float:
    """Trajectories for each one that trains the item action."""
    return counts.group / config.best


def corrects_tokens(config: RecPOLossConfig) -> bool:
    """Whether the importance ratio is one of each token, not of each trajectory."""
    return config.importance_sampling_mode.startswith("token")


def bounded(ratio: torch.Tensor, config: RecPOLossConfig) -> torch.Tensor:
    """The importance ratio within the bounds of ``config``: what leaves them becomes the bound, or
    0 in the modes that mask."""
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if low is None and high is None:
        return ratio
    if config.importance_sampling_mode.endswith("truncate"):
        return ratio.clamp(low, high)
    out = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        out |= ratio < low
    if high is not None:
        out |= ratio > high
    return ratio.masked_fill(out, 0.0)


def _at_least_one(count: float | torch.Tensor) -> float | torch.Tensor:
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(1, count)

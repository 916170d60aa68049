"""Settings and results of the RecPO loss, as plain values that travel together."""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .._checks import SIMILARITIES, as_int, as_number, check_positive, one_of

REDUCTIONS = ("token", "sequence", "constant", "sum")
ESTIMATORS = ("grpo", "rloo")
RATIO_LEVELS = ("token", "sequence")
ITEM_NEGATIVES = ("in-batch", "catalog")
IMPORTANCE_SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

_told: set[str] = set()  # reductions whose change of weight this process was told


@dataclass(frozen=True)
class RecPOLossConfig:
    """Settings of :func:`r2ec_kernels.recpo_loss`. Validated when built.

    Attributes:
        epsilon: lower clip of the ratio: it does not earn more below 1 - epsilon.
        epsilon_high: upper clip: 1 + epsilon_high (the paper 0.2, the reference code 0.28).
        reduction: how the losses of actions become one number, which is what one action weighs.
            "sum" (the paper's): 1 / trajectories; "token": 1 / num_tokens (TRL "dapo", with the
            local count TRL "bnpo"); "sequence": 1 / (trajectories * tokens of its trajectory) (TRL
            "grpo"); "constant": 1 / (trajectories * max_completion_length) (TRL "dr_grpo"). The
            actions of a trajectory are its tokens and, for the best ones of a group, its item.
        estimator: "grpo" or "rloo", see :func:`r2ec_kernels.grouped_advantage`.
        best: how many trajectories of each group train the item action.
        item_weight: loss = token_loss + item_weight * item_loss; 1: the item action weighs as
            much as a token of its trajectory.
        item_temperature: temperature of the softmax over items.
        item_negatives: "in-batch": candidates are ``item_states``. "catalog": candidates are the
            rows of ``item_table``, with the rows ``item_ids`` replaced by ``item_states``.
        similarity: "cosine", "dot" or "l2" (minus the unsquared distance), of the item term.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma-2: 30).
        temperature: the sampling temperature; log-probabilities are taken at it.
        kl_weight: weight of the k3 estimate of KL(policy, reference); needs ``ref_log_prob``.
        importance_sampling_mode: the factor of a token's loss that corrects for a sampler with
            other numerics, by TRL's names. Its ratio is exp(old_log_prob - sampler_log_prob) of the
            token ("token_..."), or of the sum over the tokens of its trajectory ("sequence_...").
            Outside the two bounds it becomes the bound ("..._truncate") or 0 ("..._mask").
        importance_sampling_clip_min: lower bound of the ratio; None: no bound.
        importance_sampling_clip_max: upper bound of the ratio; None: no bound.
        ratio_level: "token", or "sequence" (GSPO): one ratio for a trajectory, the geometric mean
            of its token ratios.
        max_completion_length: tokens, the divisor of reduction "constant".
        entropy: return the mean entropy of the tokens as a statistic (a few percent more time).
        impl: "auto", "triton", "torch" or "reference".
    """

    epsilon: float = 0.2
    epsilon_high: float = 0.2
    reduction: str = "sum"
    estimator: str = "grpo"
    best: int = 1
    item_weight: float = 1.0
    item_temperature: float = 0.02
    item_negatives: str = "in-batch"
    similarity: str = "cosine"
    softcap: float | None = None
    temperature: float = 1.0
    kl_weight: float = 0.0
    importance_sampling_mode: str = "token_truncate"
    importance_sampling_clip_min: float | None = None
    importance_sampling_clip_max: float | None = 3.0
    ratio_level: str = "token"
    max_completion_length: int | None = None
    entropy: bool = False
    impl: str = "auto"

    def __post_init__(self) -> None:
        one_of("reduction", self.reduction, REDUCTIONS)
        one_of("estimator", self.estimator, ESTIMATORS)
        one_of("similarity", self.similarity, SIMILARITIES)
        one_of("ratio_level", self.ratio_level, RATIO_LEVELS)
        one_of("item_negatives", self.item_negatives, ITEM_NEGATIVES)
        one_of("importance_sampling_mode", self.importance_sampling_mode, IMPORTANCE_SAMPLING_MODES)
        for name in ("epsilon", "epsilon_high", "item_weight", "kl_weight"):
            if not as_number(name, getattr(self, name)) >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        for name in ("temperature", "item_temperature"):
            check_positive(name, getattr(self, name))
        for name in ("softcap", "importance_sampling_clip_max"):
            value = getattr(self, name)
            if value is not None and not as_number(name, value) > 0:
                raise ValueError(f"{name}: expected a number > 0 or None, got {value}")
        check_importance_bounds(
            "importance_sampling",
            self.importance_sampling_clip_min,
            self.importance_sampling_clip_max,
        )
        as_int("best", self.best, 1)
        length = self.max_completion_length
        if self.reduction == "constant" and (length is None or length < 1):
            raise ValueError(
                "max_completion_length: reduction 'constant' divides by it, expected an integer "
                f">= 1, got {length}"
            )
        self._tell_changed_weight()

    def _tell_changed_weight(self) -> None:
        """Once a process for each reduction whose item action weighs less than in release 0.1."""
        if self.reduction == "sum" or not self.item_weight or self.reduction in _told:
            return
        _told.add(self.reduction)
        warnings.warn(
            f"reduction {self.reduction!r}: since release 0.2 the item action is one more action "
            "of its trajectory and weighs as much as one of its tokens; before, it weighed "
            "1 / (groups * best), as much as all tokens of its group together. item_weight 1 is "
            "the paper's weight (docs/method.md#reductions)",
            FutureWarning,
            stacklevel=4,
        )


def check_importance_bounds(prefix: str, low: float | None, high: float | None) -> None:
    """Raise unless the bounds of the importance ratio leave something between them."""
    if low is not None and not as_number(f"{prefix}_clip_min", low) >= 0:
        raise ValueError(f"{prefix}_clip_min: expected a number >= 0 or None, got {low}")
    if low is not None and high is not None and not low < high:
        raise ValueError(
            f"{prefix}_clip_min: expected less than {prefix}_clip_max ({high}), got {low}"
        )


class RecPOLoss(NamedTuple):
    """What :func:`r2ec_kernels.recpo_loss` returns. Every field is a tensor or None.

    Gradients flow through ``loss`` only; the rest is for storing and for the log.
    """

    loss: torch.Tensor  # scalar: token_loss + item_weight * item_loss
    token_loss: torch.Tensor  # scalar, the KL term included
    item_loss: torch.Tensor  # scalar
    log_prob: torch.Tensor  # [T], 0 where not counted
    item_log_prob: torch.Tensor  # [B, G], of the user's target
    advantages: torch.Tensor  # [B, G]
    best: torch.Tensor  # bool [B, G], the trajectories that train the item action
    num_tokens: torch.Tensor  # int64 scalar, counted tokens of this call
    clip_fraction: torch.Tensor  # scalar, share of counted tokens whose gradient the clip stops
    clip_fraction_low: torch.Tensor  # scalar, below 1 - epsilon with a negative advantage
    clip_fraction_high: torch.Tensor  # scalar, above 1 + epsilon_high with a positive advantage
    item_clip_fraction: torch.Tensor  # scalar, the same for the selected item actions
    ratio: torch.Tensor  # scalar, mean ratio of the counted tokens
    importance_ratio: torch.Tensor | None  # scalar, mean factor of importance_sampling_mode: over
    # the counted tokens, or in the "sequence_..." modes over the trajectories, as TRL logs it
    importance_ratio_min: torch.Tensor | None  # scalar, the smallest of them; 0 if there are none
    importance_ratio_max: torch.Tensor | None  # scalar, the largest
    kl: torch.Tensor | None  # scalar, mean k3 estimate
    entropy: torch.Tensor | None  # scalar, mean entropy in nats

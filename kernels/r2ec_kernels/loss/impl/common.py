"""What the terms of the RecPO loss share: the constants beside log-probabilities, and divisors."""

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


class Normalizers(NamedTuple):
    """What sums are divided by: counts of the whole optimiser step, over all calls and ranks."""

    tokens: float | torch.Tensor
    trajectories: float | torch.Tensor

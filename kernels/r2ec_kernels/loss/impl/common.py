"""What the terms of the RecPO loss share: the constants beside log-probabilities, and divisors."""

from typing import NamedTuple

import torch


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


class Normalizers(NamedTuple):
    """What sums are divided by: counts of the whole optimiser step, over all calls and ranks."""

    tokens: float | torch.Tensor
    trajectories: float | torch.Tensor

"""From next-token logits to sampled tokens and their log-probabilities."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from r2ec_fast.rollout.noise import gumbel


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. `top_k=0` keeps the whole vocabulary; `greedy` takes the arg-max."""

    temperature: float = 1.0
    top_k: int = 0
    greedy: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature}; use greedy=True for the arg-max"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 = whole vocabulary), got {self.top_k}")


class Sampled(NamedTuple):
    tokens: Tensor  # int64 [n]
    log_prob: Tensor  # float32 [n]


def sample_tokens(
    logits: Tensor, keys: Tensor, position: int | Tensor, params: SamplingParams
) -> Sampled:
    """Draw one token a row by the Gumbel-max rule.

    The arg-max of `logits / temperature + noise` over the `top_k` best logits is a draw from the
    softmax over those logits. The log-probability is of the FULL softmax at the same temperature,
    without renormalising to the top-k, so that a trainer can recompute it from the logits.

    Args:
        logits: [n, V], final (soft-capped where the model caps).
        keys: int64 [n], see `noise.row_keys`.
        position: index of the token within the completion; or int64 [1] that holds it.
    """
    scaled = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    scaled = scaled / params.temperature
    if params.greedy:
        tokens = scaled.argmax(-1)
    elif 0 < params.top_k < logits.shape[-1]:
        best, candidates = scaled.topk(params.top_k, dim=-1)
        pick = (best.double() + gumbel(keys, position, candidates)).argmax(-1, keepdim=True)
        tokens = candidates.gather(-1, pick).squeeze(-1)
    else:
        candidates = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        tokens = (scaled.double() + gumbel(keys, position, candidates)).argmax(-1)
    chosen = scaled.gather(-1, tokens[:, None]).squeeze(-1)
    return Sampled(tokens, (chosen - scaled.logsumexp(-1)).float())

"""Log-probabilities of given completions by one packed pass of the training model."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from r2ec_fast.model.hf_compat import eval_mode
from r2ec_fast.packing.packer import pack_histories
from r2ec_fast.packing.ragged import Rows
from r2ec_fast.rollout.base import Rollouts
from r2ec_kernels import linear_logprob

if TYPE_CHECKING:
    from r2ec_fast.model.r2ec import R2ecModel


@torch.no_grad()
def score_rollouts(
    model: "R2ecModel",
    prompts: Rows,
    rollouts: Rollouts,
    *,
    temperature: float,
    max_tokens: int = 8192,
) -> np.ndarray:
    """Log-probabilities of the sampled tokens: full vocabulary, at `temperature`.

    Args:
        model: its states are read with gradients off, in evaluation mode.
        prompts: the B prompts the B * G rows continue; each is computed once.
        max_tokens: tokens in one forward pass.

    Returns:
        float32 [E], aligned with `rollouts.values`; 0 where not sampled.
    """
    out = np.zeros(len(rollouts.values), np.float32)
    if not len(prompts):
        return out
    batches = pack_histories(
        prompts,
        rollouts.tokens,
        num_generations=len(rollouts) // len(prompts),
        max_tokens=max_tokens,
        completion_targets=rollouts.targets,
        oversize="alone",
    )
    with eval_mode(model):
        for batch in batches:
            hidden = model(batch)
            found = linear_logprob(
                hidden[batch.predict_from.to(hidden.device)],
                model.lm_head_weight,
                batch.targets.to(hidden.device),
                bias=model.lm_head_bias,
                softcap=model.softcap,
                temperature=temperature,
            )
            out[batch.source.cpu().numpy()] = found.log_prob.float().cpu().numpy()
    return out

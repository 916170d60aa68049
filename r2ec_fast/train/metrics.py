"""What a step says about itself beyond the loss: completions, ranks, speed, memory, samples."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from r2ec_fast.train import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r2ec_fast.train.batches import Experience, UserBatch

QUANTILES = (10, 50, 90)  # per cent


def completion_stats(experiences: Sequence[Experience]) -> dict[str, float]:
    """Lengths, ends and target ranks of a step's reasonings, of all processes."""
    lengths = _of_all([e.rollouts.tokens.lengths for e in experiences])
    reasons = _of_all([e.rollouts.finish_reason for e in experiences])
    stats = {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": (reasons == "length").mean(),
        "completions/eos_ratio": (reasons == "eos").mean(),
    }
    ended = lengths[reasons != "length"]
    if len(ended):
        stats["completions/mean_terminated_length"] = ended.mean()
    ranks = _of_all([e.rank.flatten().cpu().numpy() for e in experiences])
    for q in QUANTILES:
        stats[f"rank/p{q}"] = np.percentile(ranks, q, method="inverted_cdf")
    gaps = _of_all(
        [
            np.abs(e.rollouts.log_prob - e.rollouts.sampler_log_prob)[e.rollouts.sampled]
            for e in experiences
            if e.rollouts.sampler_log_prob is not None
        ]
    )
    gaps = gaps[~np.isnan(gaps)]  # tokens that the sampler did not score
    if len(gaps):
        stats["sampling/sampling_logp_difference/mean"] = gaps.mean()
        stats["sampling/sampling_logp_difference/max"] = gaps.max()
    return {k: float(v) for k, v in stats.items()}


def _of_all(parts: Sequence[np.ndarray | list[str]]) -> np.ndarray:
    own = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    every = [part for part in distributed.gather_objects(own) if len(part)]
    return np.concatenate(every) if every else own


class StepMeter:
    """Speed and memory of one step: made at its start, read at its end."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def read(self, users: Sequence[UserBatch], completions: Sequence[np.ndarray]) -> dict:
        """``step_time`` (s), ``perf/examples_per_second`` and ``perf/tokens_per_second`` (prompt
        and completion tokens) of all processes, ``perf/peak_memory_mib`` (of the process that
        needed most: CUDA memory of the step; without a GPU, resident memory since the process
        began)."""
        examples = sum(len(batch.targets) for batch in users)
        tokens = sum(len(batch.prompts.values) for batch in users) + sum(map(len, completions))
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        every = distributed.gather_objects((examples, tokens, peak))
        seconds = time.perf_counter() - self._started
        return {
            "step_time": seconds,
            "perf/examples_per_second": sum(examples for examples, *_ in every) / seconds,
            "perf/tokens_per_second": sum(tokens for _, tokens, _ in every) / seconds,
            "perf/peak_memory_mib": max(peak for *_, peak in every),
        }


def reasoning_samples(
    experience: Experience,
    step: int,
    tokenizer: PreTrainedTokenizerBase,
    titles: Sequence[str],
    user: int = 0,
) -> list[dict]:
    """The reasonings of one user of a step, with what they earned, one record each."""
    rollouts, group = experience.rollouts, experience.rewards.shape[1]
    records = []
    for g in range(group):
        row = user * group + g
        records.append(
            {
                "step": step,
                "example": experience.users.keys[user],
                "target": titles[int(experience.users.targets[user])],
                "prompt": tokenizer.decode(experience.users.prompts[user].tolist()),
                "completion": tokenizer.decode(rollouts.row(row).tolist()),
                "finish_reason": rollouts.finish_reason[row],
                "reward": float(experience.rewards[user, g]),
                "rank": int(experience.rank[user, g]),
            }
        )
    return records

"""Groups whose rewards tie teach nothing: sample them again, a bounded number of times.

The reward is otherwise known only inside the update's own forward pass. Here every round costs a
scoring pass of its own over the groups it sampled, and the tokens of those it throws away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.rollout import Rollouts
from r2ec_fast.train import distributed
from r2ec_fast.train.batches import Experience, UserBatch
from r2ec_fast.train.update import PolicyUpdate
from r2ec_kernels import grouped_advantage

Generate = Callable[[UserBatch, int], Rollouts]

# apart from every step number: a round's samples are those of no other step
_ROUND_KEY = 1 << 40


def round_key(step: int, round_: int) -> int:
    """The step that names a round's samples to the counter-based sampler; round 0: ``step``."""
    return step + round_ * _ROUND_KEY


@dataclass
class ResamplingCost:
    """What a step's extra rounds took, of this process."""

    resampled: int = 0
    tied: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def totals(self) -> dict[str, float]:
        """Over all processes: groups sampled again, groups that still tie, tokens sampled in extra
        rounds; and the longest time (s) that a process spent on scoring and extra rounds."""
        every = distributed.gather_objects((self.resampled, self.tied, self.tokens, self.seconds))
        resampled, tied, tokens, seconds = zip(*every, strict=True)
        return {
            "dynamic_sampling/resampled_groups": sum(resampled),
            "dynamic_sampling/tied_groups": sum(tied),
            "dynamic_sampling/extra_tokens": sum(tokens),
            "dynamic_sampling_time": max(seconds),
        }


def resample_ties(
    users: UserBatch,
    rollouts: Rollouts,
    *,
    update: PolicyUpdate,
    generate: Generate,
    rounds: int,
    cost: ResamplingCost,
) -> Rollouts:
    """``rollouts`` [B * G] with the groups of tied rewards sampled again, at most ``rounds`` times.

    ``generate(users, round)`` samples; the item table must hold the step's target rows. What was
    done is added to ``cost``. A group that ties after the last round stays as it is.
    """
    started, device = time.perf_counter(), update.model.device
    candidates, groups = rollouts, np.arange(len(users.targets))
    for round_ in range(rounds + 1):
        if round_:
            part = users.select(groups)
            candidates = generate(part, round_)
            cost.resampled += len(groups)
            cost.tokens += int(candidates.sampled.sum())
            rollouts = replace_groups(rollouts, groups, candidates)
        experience = Experience.of(users.select(groups), candidates, device)
        update.score(experience)
        advantages = grouped_advantage(experience.rewards).advantages
        tied = (advantages == 0).all(1).cpu().numpy()  # what the loss would make of them
        groups = groups[tied]
        if not len(groups):
            break
    cost.tied += len(groups)
    cost.seconds += time.perf_counter() - started
    return rollouts


def replace_groups(rollouts: Rollouts, groups: np.ndarray, new: Rollouts) -> Rollouts:
    """``rollouts`` with the rows of ``groups`` taken from ``new``, which holds these alone."""
    size = len(new) // len(groups)
    source = np.arange(len(rollouts))  # rows of both, one after the other
    source.reshape(-1, size)[groups] = len(rollouts) + np.arange(len(new)).reshape(-1, size)
    both = Ragged.stack([rollouts.tokens, new.tokens])
    at, tokens = both.positions(source), both.select(source)

    def joined(old_values: np.ndarray, new_values: np.ndarray) -> np.ndarray:
        return np.concatenate([old_values, new_values])[at]

    reasons = [*rollouts.finish_reason, *new.finish_reason]
    sampler, again = rollouts.sampler_log_prob, new.sampler_log_prob
    return replace(
        rollouts,
        values=tokens.values,
        offsets=tokens.offsets,
        sampled=joined(rollouts.sampled, new.sampled),
        log_prob=joined(rollouts.log_prob, new.log_prob),
        finish_reason=[reasons[row] for row in source],
        sampler_log_prob=None if sampler is None or again is None else joined(sampler, again),
    )

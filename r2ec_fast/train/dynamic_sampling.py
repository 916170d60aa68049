"""Groups whose rewards tie teach nothing: sample them again, a bounded number of times.

The reward is otherwise known only inside the update's own forward pass. Here every round costs a
scoring pass of its own over the groups it sampled, and the tokens of those it throws away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from r2ec_fast.rollout import Rollouts
from r2ec_fast.train import distributed
from r2ec_fast.train.update import Experience, PolicyUpdate, UserBatch, select_rows

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
            part = select_users(users, groups)
            candidates = generate(part, round_)
            cost.resampled += len(groups)
            cost.tokens += int(candidates.sampled.sum())
            rollouts = replace_groups(rollouts, groups, candidates)
        experience = Experience.of(select_users(users, groups), candidates, device)
        update.score(experience)
        tied = (experience.rewards.amax(1) == experience.rewards.amin(1)).cpu().numpy()
        groups = groups[tied]
        if not len(groups):
            break
    cost.tied += len(groups)
    cost.seconds += time.perf_counter() - started
    return rollouts


def select_users(users: UserBatch, groups: np.ndarray) -> UserBatch:
    """The given users of a batch."""
    return UserBatch(
        prompts=[users.prompts[i] for i in groups],
        targets=users.targets[groups],
        exclude=select_rows(users.exclude, groups),
        keys=[users.keys[i] for i in groups],
    )


def replace_groups(rollouts: Rollouts, groups: np.ndarray, new: Rollouts) -> Rollouts:
    """``rollouts`` with the rows of ``groups`` taken from ``new``, which holds these alone."""
    size = len(new) // len(groups)
    at = {int(group): i for i, group in enumerate(groups)}
    sources = [
        (new, at[r // size] * size + r % size) if r // size in at else (rollouts, r)
        for r in range(len(rollouts))
    ]

    def joined(name: str) -> np.ndarray:
        return np.concatenate(
            [getattr(s, name)[s.offsets[r] : s.offsets[r + 1]] for s, r in sources]
        )

    names = ["values", "sampled", "log_prob"]
    if rollouts.sampler_log_prob is not None:
        names.append("sampler_log_prob")
    lengths = [int(s.offsets[r + 1] - s.offsets[r]) for s, r in sources]
    return replace(
        rollouts,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        finish_reason=[s.finish_reason[r] for s, r in sources],
        **{name: joined(name) for name in names},
    )

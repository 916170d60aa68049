"""Whether reasoning pays, and whether the reasonings of a group differ: what is measured.

Three things are put beside each other on the same examples: the rank of the target in direct mode,
after the greedy reasoning, and after each of G sampled reasonings. The swap test ranks once more
with the greedy reasonings handed round: every user is read out after the own prompt and *another*
user's reasoning. An item head that ignores the reasoning cannot tell the difference.

How to read the figures: docs/guides/evaluate-recommend.md#does-reasoning-pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike

from r2ec_fast.eval.metrics import STDERR, paired_differences, ranking_metrics
from r2ec_fast.eval.ranking import rank_examples
from r2ec_fast.packing.ragged import Ragged
from r2ec_kernels import grouped_advantage, recpo_reward

if TYPE_CHECKING:
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.data import Examples, RecDataset
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.prompts.segments import PromptAssembler
    from r2ec_fast.rollout import RolloutEngine, Rollouts

_SWAP = 2  # tells this use of (seed, number of examples) from others
# the sampler's step: those of training begin at 1, so that no training step has this noise, and it
# is the same at every validation, so that what changes between two of them is the model
_STEP = 0


def paired_ndcg(
    name: str, ranks: ArrayLike, other: ArrayLike, users: ArrayLike
) -> dict[str, float]:
    """``{name}_ndcg@10``: the mean of the examples' differences, ``ranks`` [X] minus ``other`` [X],
    and ``{name}_ndcg@10/se``, its standard error by users [X]
    (:func:`~r2ec_fast.eval.metrics.paired_differences`)."""
    found = paired_differences(ranks, other, ks=(10,), users=users)
    return {f"{name}_ndcg@10{end}": found[f"ndcg@10{end}"] for end in ("", STDERR)}


def other_users(users: np.ndarray, seed: int) -> np.ndarray | None:
    """For each of X examples the number of one of another user: int64 [X], a seeded permutation.

    ``users`` [X] says whose each example is. None where no such permutation exists, because one
    user has more than half of the examples.
    """
    rng = np.random.default_rng([seed, len(users), _SWAP])
    shuffled = rng.permutation(len(users))
    drawn = np.asarray(users)[shuffled]
    _, user, sizes = np.unique(drawn, return_inverse=True, return_counts=True)
    largest = int(sizes.max(initial=0))
    if 2 * largest > len(users):
        return None
    # the examples of a user side by side, the users in random order: a turn by the most that any
    # user has takes every example out of its own user's
    place = rng.permutation(len(sizes))
    order = shuffled[np.argsort(place[user], kind="stable")]
    others = np.empty(len(users), np.int64)
    others[order] = np.roll(order, -largest)
    return others


@dataclass(frozen=True)
class Groups:
    """G sampled reasonings for each of X examples.

    Attributes:
        direct: int64 [X], the target's rank in direct mode.
        rank: int64 [X, G], its rank after each reasoning.
        reward: float32 [X, G], what RecPO would pay for it.
        tokens: int64 [X, G], length of the reasoning with its marker.
        finish_reason: str [X, G]: "answer" (the marker was written), "eos" or "length".
    """

    direct: np.ndarray
    rank: np.ndarray
    reward: np.ndarray
    tokens: np.ndarray
    finish_reason: np.ndarray

    @classmethod
    def empty(cls, num_generations: int) -> Groups:
        """Of no examples."""
        shape = (0, num_generations)
        return cls(
            direct=np.zeros(0, np.int64),
            rank=np.zeros(shape, np.int64),
            reward=np.zeros(shape, np.float32),
            tokens=np.zeros(shape, np.int64),
            finish_reason=np.zeros(shape, np.str_),
        )

    @classmethod
    def stack(cls, parts: Sequence[Groups]) -> Groups:
        """The examples of all ``parts``, one part after the other."""
        names = ("direct", "rank", "reward", "tokens", "finish_reason")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def best_beats_direct(self) -> float:
        """Share of the examples whose best reasoning ranks the target strictly better than direct
        mode does."""
        return float((self.rank.min(axis=1) < self.direct).mean())

    def figures(self) -> dict[str, float]:
        """Shares, means over examples, and ``num_generations``, which they depend on.

        ``ended_ratio`` and ``clipped_ratio``: reasonings that wrote the marker, and that ran out of
        length (the rest wrote an end-of-text token); ``mean_length`` in tokens; ``reward``;
        ``reward_std``: standard deviation (unbiased) within a group; ``frac_reward_zero_std``:
        groups whose rewards all tie, so that the loss gives them no advantage;
        ``best_beats_direct``.
        """
        group = self.reward.shape[1]
        tied = np.ones(len(self.reward), bool)
        if group > 1:
            advantages = grouped_advantage(torch.from_numpy(self.reward)).advantages
            tied = (advantages == 0).all(1).numpy()
        out = {
            "num_generations": group,
            "ended_ratio": (self.finish_reason == "answer").mean(),
            "clipped_ratio": (self.finish_reason == "length").mean(),
            "mean_length": self.tokens.mean(),
            "reward": self.reward.mean(dtype=np.float64),
            "reward_std": self.reward.std(1, ddof=1, dtype=float).mean() if group > 1 else 0.0,
            "frac_reward_zero_std": tied.mean(),
            "best_beats_direct": self.best_beats_direct(),
        }
        return {name: float(value) for name, value in out.items()}


@dataclass(frozen=True)
class ReasoningRanks:
    """What :meth:`ReasoningProbe.measure` found for X examples: their ``groups``; ranks int64 [X]
    of the targets after the greedy reasoning (``own``) and after another user's (``swapped``; None
    where one user has more than half of the examples)."""

    groups: Groups
    own: np.ndarray
    swapped: np.ndarray | None

    @classmethod
    def stack(cls, parts: Sequence[ReasoningRanks]) -> ReasoningRanks:
        """The examples of all ``parts``, one part after the other."""
        swapped = [part.swapped for part in parts if part.swapped is not None]
        return cls(
            Groups.stack([part.groups for part in parts]),
            np.concatenate([part.own for part in parts]),
            np.concatenate(swapped) if swapped else None,
        )

    def figures(self, users: np.ndarray) -> dict[str, float]:
        """All figures of X >= 1 examples of ``users`` [X].

        ``examples``; ``direct_hit_rate@1``, ``direct_ndcg@10`` and ``reasoned_ndcg@10`` (greedy);
        ``reasoned_minus_direct_ndcg@10`` and, where reasonings could be swapped,
        ``own_minus_swapped_ndcg@10``, each with its ``/se``; and those of :meth:`Groups.figures`.
        """
        direct = self.groups.direct
        out = {"examples": float(len(direct)), "direct_hit_rate@1": float((direct == 1).mean())}
        for name, ranks in (("direct", direct), ("reasoned", self.own)):
            out[f"{name}_ndcg@10"] = ranking_metrics(ranks, ks=(10,))["ndcg@10"]
        out |= paired_ndcg("reasoned_minus_direct", self.own, direct, users)
        if self.swapped is not None:
            out |= paired_ndcg("own_minus_swapped", self.own, self.swapped, users)
        return out | self.groups.figures()


class ReasoningProbe:
    """Has reasonings written and ranks with what is read after them.

    Args:
        model: with an item table, which is used as it stands.
        assembler: writes its prompts.
        dataset: whose examples are asked for.
        engine: writes the reasonings.
        config: how RecPO samples a group and rewards it: ``num_generations``, ``temperature``,
            ``top_k``, ``max_completion_length``, ``reward_softmax_weight``, ``reward_ndcg_k``,
            ``seed``.
        max_tokens: token budget of a forward pass.
        exclude_window: exclude only the items shown, not all of the user's earlier ones.
        include: the only items that targets are ranked among (:func:`rank_examples`); None: all.
        batch_size: examples computed together.

    ``keys`` int64 [X] are the examples' numbers in the whole sample, 0 to X - 1 unless they are a
    part of it: what is sampled depends on them, not on which process draws it.
    """

    def __init__(
        self,
        model: R2ecModel,
        assembler: PromptAssembler,
        dataset: RecDataset,
        engine: RolloutEngine,
        config: RecPOConfig,
        *,
        max_tokens: int = 16384,
        exclude_window: bool = False,
        include: np.ndarray | torch.Tensor | None = None,
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.model, self.assembler, self.dataset = model, assembler, dataset
        self.engine, self.config = engine, config
        self.max_tokens, self.exclude_window = max_tokens, exclude_window
        self.include = include
        self.batch_size = batch_size

    def figures(self, examples: Examples) -> dict[str, float]:
        """:meth:`ReasoningRanks.figures` of X >= 1 examples, all by this process."""
        own, others = self.greedy(examples), other_users(examples.user, self.config.seed)
        swapped = None if others is None else own.select(others)
        return self.measure(examples, own, swapped).figures(examples.user)

    def greedy(self, examples: Examples, keys: np.ndarray | None = None) -> Ragged:
        """The greedy reasoning of each example: X rows of token ids with the marker."""
        keys = np.arange(len(examples)) if keys is None else keys
        rows = [Ragged.of([])]
        for start in range(0, len(examples), self.batch_size):
            part = slice(start, start + self.batch_size)
            rows.append(self._write(examples[part], keys[part], 1, greedy=True).tokens)
        return Ragged.stack(rows)

    def measure(
        self,
        examples: Examples,
        own: Ragged,
        swapped: Ragged | None,
        keys: np.ndarray | None = None,
    ) -> ReasoningRanks:
        """Rank X examples after ``own`` and ``swapped`` reasonings (X rows each), and sample their
        groups."""
        return ReasoningRanks(
            self.groups(examples, keys),
            self._rank(examples, own)[0],
            None if swapped is None else self._rank(examples, swapped)[0],
        )

    def groups(self, examples: Examples, keys: np.ndarray | None = None) -> Groups:
        """Sample the groups of X examples as a step of RecPO would."""
        keys = np.arange(len(examples)) if keys is None else keys
        parts = [Groups.empty(self.config.num_generations)]
        for start in range(0, len(examples), self.batch_size):
            part = slice(start, start + self.batch_size)
            parts.append(self._sampled(examples[part], keys[part]))
        return Groups.stack(parts)

    def _sampled(self, examples: Examples, keys: np.ndarray) -> Groups:
        config, shape = self.config, (len(examples), self.config.num_generations)
        rollouts = self._write(examples, keys, config.num_generations, greedy=False)
        rank, log_prob = self._rank(examples, rollouts.tokens)
        reward = recpo_reward(
            torch.from_numpy(rank),
            torch.from_numpy(log_prob),
            softmax_weight=config.reward_softmax_weight,
            ndcg_k=config.reward_ndcg_k,
        )
        return Groups(
            self._rank(examples)[0],
            rank.reshape(shape),
            reward.numpy().reshape(shape),
            rollouts.tokens.lengths.reshape(shape),
            np.array(rollouts.finish_reason).reshape(shape),
        )

    def _write(
        self, examples: Examples, keys: np.ndarray, num_generations: int, *, greedy: bool
    ) -> Rollouts:
        config = self.config
        return self.engine.generate(
            self.assembler.example_rows(self.dataset, examples),
            user_keys=keys.tolist(),
            num_generations=num_generations,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_k=config.top_k,
            seed=config.seed,
            step=_STEP,
            greedy=greedy,
        )

    def _rank(
        self, examples: Examples, reasonings: Ragged | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ranks and log-probabilities after ``reasonings``; without them, in direct mode."""
        return rank_examples(
            self.model,
            self.assembler,
            self.dataset,
            examples,
            reasonings=reasonings,
            max_tokens=self.max_tokens,
            exclude_window=self.exclude_window,
            include=self.include,
            batch_size=self.batch_size,
        )

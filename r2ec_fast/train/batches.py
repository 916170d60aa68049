"""What a step of training is made of: users, their rollouts, candidate items, counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.train import distributed
from r2ec_fast.train.fault_tolerance import together
from r2ec_fast.train.fsdp import is_sharded

if TYPE_CHECKING:
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.rollout import Rollouts

# the tokens of item prompts, by internal id
ItemRows = Mapping[int, Sequence[int] | np.ndarray]


FEWER_ITEMS = (
    "the step's target items do not fit, each encoded alone; lower per_device_train_batch_size or "
    "gradient_accumulation_steps, or set gradient_checkpointing"
)


@dataclass(frozen=True)
class UserBatch:
    """B users: ``prompts``, B rows of token ids; ``targets`` int64 [B] (internal item ids);
    ``exclude``, B rows of their earlier items; ``keys`` that name the examples for the sampler."""

    prompts: Ragged
    targets: np.ndarray
    exclude: Ragged
    keys: list[int]

    def select(self, users: np.ndarray) -> UserBatch:
        """The given users, int64 [S], in that order."""
        return UserBatch(
            self.prompts.select(users),
            self.targets[users],
            self.exclude.select(users),
            [self.keys[i] for i in users],
        )


class Candidates:
    """The step's target items, encoded with gradient: the in-batch softmax's candidates.

    ``ids`` int64 [M] are the distinct targets of all processes, ascending; ``leaf`` [M, d] their
    states. Gradients collect on ``leaf``; :meth:`backward` sends them through the encoder. Each
    process encodes a part of the items; with sharded weights, whose passes need every process, all
    encode all.
    """

    def __init__(self, model: R2ecModel, item_rows: ItemRows, max_tokens: int) -> None:
        ids = sorted(item_rows)
        self.sharded = is_sharded(model)
        self.own = slice(None) if self.sharded else slice(*_shard_bounds(len(ids)))
        rows = Ragged.of([item_rows[i] for i in ids[self.own]])
        self.divisible = max_tokens > rows.lengths.max(initial=0)
        with together("target items", linked=self.sharded) as section:
            section.smallest = None if self.divisible else FEWER_ITEMS
            self.states = model.read_out(rows, max_tokens=max_tokens)
        self.ids = torch.tensor(ids, device=model.device)
        every = self.states.detach() if self.sharded else distributed.gather_rows(self.states)
        self.leaf = every.requires_grad_()

    def rows_of(self, targets: np.ndarray) -> torch.Tensor:
        """The row of each target, int64 [B]."""
        return torch.searchsorted(self.ids, torch.from_numpy(targets).to(self.ids.device))

    def gradient(self) -> torch.Tensor:
        """What this process's micro-batches left on the candidates' states, [M, d]."""
        return torch.zeros_like(self.leaf) if self.leaf.grad is None else self.leaf.grad

    def backward(self) -> None:
        """Push the collected gradient through the item encoder."""
        gradient = self.gradient()
        if not self.sharded:  # else the backward pass sums it, with that of the weights
            gradient = distributed.sum_(gradient)
        with together("gradient of the target items", linked=self.sharded) as section:
            section.smallest = None if self.divisible else FEWER_ITEMS
            if self.states.requires_grad and len(self.states):
                self.states.backward(gradient[self.own])


def _shard_bounds(count: int) -> tuple[int, int]:
    rank, size = distributed.world()
    return count * rank // size, count * (rank + 1) // size


@dataclass
class Experience:
    """One accumulation step's rollouts and what is known of them; B users of G reasonings.

    ``rewards`` and ``rank`` [B, G], and ``old_item_log_prob`` [B, G], are filled by the first
    update and reused by later iterations on the same rollouts.
    """

    users: UserBatch
    rollouts: Rollouts
    rewards: torch.Tensor
    rank: torch.Tensor
    old_item_log_prob: torch.Tensor
    scored: bool = False

    @classmethod
    def of(cls, users: UserBatch, rollouts: Rollouts, device: torch.device) -> Experience:
        shape = (len(users.targets), len(rollouts) // max(len(users.targets), 1))
        return cls(
            users,
            rollouts,
            rewards=torch.zeros(shape, device=device),
            rank=torch.zeros(shape, dtype=torch.int64, device=device),
            old_item_log_prob=torch.zeros(shape, device=device),
        )


@dataclass
class UpdateStats:
    """Statistics of a step, summed on the device over micro-batches and moved once at the end."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    bounds: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)  # sign, sign * value

    def add(
        self, name: str, value: torch.Tensor, weight: torch.Tensor | float | None = None
    ) -> None:
        """Add ``value`` to the weighted mean ``name``; without a weight, to a plain sum."""
        value = value.detach().double()
        if weight is not None:
            weight = torch.as_tensor(weight, dtype=torch.float64, device=value.device)
            self.weights[name] = self.weights.get(name, 0) + weight
            value = value * weight
        self.sums[name] = self.sums.get(name, 0) + value

    def bound(self, name: str, value: torch.Tensor, *, largest: bool) -> None:
        """Keep the largest or smallest ``value`` given for ``name``."""
        sign = 1 if largest else -1
        value = sign * value.detach().double()
        if name in self.bounds:
            value = torch.maximum(value, self.bounds[name][1])
        self.bounds[name] = (sign, value)

    def totals(self) -> dict[str, float]:
        """Means, sums and bounds over all processes."""
        if not self.sums:
            return {}
        signs = {n: sign for n, (sign, _) in sorted(self.bounds.items())}
        bounds: dict[str, float] = {}
        if signs:
            values = distributed.max_(torch.stack([self.bounds[n][1] for n in signs]))
            bounds = {n: s * v for (n, s), v in zip(signs.items(), values.tolist(), strict=True)}
        names = sorted(self.sums)
        one = torch.ones_like(self.sums[names[0]])
        both = torch.stack([torch.stack([self.sums[n], self.weights.get(n, one)]) for n in names])
        return bounds | {
            n: (s if n not in self.weights else s / w if w else 0.0)
            for n, (s, w) in zip(names, distributed.sum_(both).tolist(), strict=True)
        }

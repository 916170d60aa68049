"""A recommender whose read-outs and reasonings are planted, so that every rank is known by hand.

A reasoning names one item, by one token before the marker; the state read behind it is that item's
row of the table, so that the item scores 1 and every other one 0. Where no item is named (direct
mode, fillers) the state is the same for everybody: item 0 is first, and then the others by id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from _support.toy import toy_dataset, toy_model

from r2ec_fast.data import RecDataset
from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.rollout import Rollouts
from r2ec_fast.rollout.base import Trajectory, assemble

ITEMS = 16
FIRST_NAME = 300  # token FIRST_NAME + i names item i; no toy prompt ends with one of these
FILLER = 290


class PlantedModel(R2ecModel):
    """Reads, behind a marker, the item that was named before it."""

    reads = True
    marker_length = 0

    @classmethod
    def make(cls, *, reads: bool = True) -> PlantedModel:
        toy = toy_model(dtype=torch.float32)
        model = cls(toy.backbone, toy.tokenizer, temperature=1.0, prompts=toy.prompts)
        model.reads = reads
        model.marker_length = len(model.prompt_builder(toy_dataset().data.catalog).marker_ids)
        model.set_items(torch.eye(ITEMS, model.hidden_size))
        return model.eval()

    def forward(self, batch, prefix=None):
        tokens = batch.input_ids[0].roll(self.marker_length)  # what stands before a marker here
        named = tokens - FIRST_NAME
        named[(named < 0) | (named >= ITEMS) | (not self.reads)] = 0
        return torch.eye(ITEMS, self.hidden_size)[named]


class PlantedEngine:
    """Writes for every user key what it is told to: ``greedy`` {key: row}, ``sampled`` {key: G
    rows}, of token ids without the marker; ``cut``: rows that ran out of length."""

    def __init__(
        self,
        marker: Sequence[int],
        greedy: dict[int, list[int]],
        sampled: dict[int, list[list[int]]],
        cut: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.marker, self.greedy, self.sampled, self.cut = marker, greedy, sampled, set(cut)
        self.calls: list[dict] = []

    def generate(self, prompts, *, user_keys, num_generations, greedy=False, **rest) -> Rollouts:
        assert len(prompts) == len(user_keys)
        self.calls.append({"num_generations": num_generations, "greedy": greedy, **rest})
        rows = []
        for key in user_keys:
            written = [self.greedy[key]] if greedy else self.sampled[key]
            assert len(written) == num_generations
            for g, tokens in enumerate(written):
                if (key, g) in self.cut:
                    rows.append(Trajectory(list(tokens), [0.0] * len(tokens), "length"))
                else:
                    tokens = [*tokens, *self.marker]
                    rows.append(Trajectory(tokens, [0.0] * len(tokens), "answer"))
        return assemble(rows, self.marker)


def planted(*, reads: bool = True) -> tuple[PlantedModel, PromptAssembler, RecDataset]:
    """Model, assembler and data of the planted world: 12 users, one validation example each."""
    model, data = PlantedModel.make(reads=reads), toy_dataset()
    return model, PromptAssembler(model.prompt_builder(data.data.catalog)), data


def name(item: int, before: int = 0) -> list[int]:
    """A reasoning that names an item after so many fillers."""
    return [FILLER] * before + [FIRST_NAME + int(item)]


def rank_by_hand(named: int, target: int, seen: np.ndarray) -> int:
    """Where the target stands after a reasoning that names an item (-1: none), without the items
    seen."""
    first = max(named, 0)
    if first == target:
        return 1
    others = [item for item in range(ITEMS) if item not in set(seen.tolist()) - {target}]
    order = sorted(others, key=lambda item: (item != first, item))
    return order.index(target) + 1


def ranks_by_hand(data: RecDataset, examples, named: Sequence[int]) -> np.ndarray:
    """:func:`rank_by_hand` for every example, int64 [X]."""
    seen = Ragged.of(data.exclude(examples))
    targets = data.target(examples)
    return np.array([rank_by_hand(*row) for row in zip(named, targets, seen, strict=True)])

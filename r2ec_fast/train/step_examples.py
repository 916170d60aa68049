"""Which examples a step trains on: those of the training split, or given reasonings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from r2ec_fast.data.splits import examples_at
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.train import distributed
from r2ec_fast.train.batches import UserBatch
from r2ec_fast.train.supervised import written_rows

if TYPE_CHECKING:
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.data import Reasonings, RecDataset
    from r2ec_fast.prompts.segments import PromptAssembler


class StepExamples:
    """The users of every step of a run: a function of seed, step and process.

    ``records``: draw from these given reasonings instead of the training split; ``written`` then
    holds the tokens of each (None otherwise). Raises ValueError for records that do not fit.
    """

    def __init__(
        self,
        data: RecDataset,
        records: Reasonings | None,
        config: RecPOConfig,
        assembler: PromptAssembler,
    ) -> None:
        self.data, self.config, self.assembler = data, config, assembler
        self.written: Ragged | None = None
        self.examples, self.targets = data.train, data.target(data.train)
        if records is not None:
            self.examples, self.targets = records.examples, records.items
            limit = config.max_completion_length
            self.written = written_rows(assembler.builder, records, limit)

    @property
    def users_per_step(self) -> int:
        """Users of all processes in one optimiser step."""
        config = self.config
        users = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return users * distributed.world()[1]

    @property
    def max_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.config.max_steps >= 0:
            return self.config.max_steps
        return math.ceil(self.config.num_train_epochs * len(self.examples) / self.users_per_step)

    def of_step(self, step: int) -> list[UserBatch]:
        """This process's users of ``step``, one batch an accumulation step."""
        return [self.batch(step, a) for a in range(self.config.gradient_accumulation_steps)]

    def batch(self, step: int, accumulation: int) -> UserBatch:
        """This process's users of one accumulation step."""
        config, (rank, processes) = self.config, distributed.world()
        size = config.per_device_train_batch_size
        first = (step - 1) * self.users_per_step + (accumulation * processes + rank) * size
        index = examples_at(np.arange(first, first + size), len(self.examples), config.seed)
        examples = self.examples[index]
        return UserBatch(
            prompts=self.assembler.example_rows(self.data, examples),
            targets=self.targets[index],
            exclude=Ragged.of(self.data.exclude(examples)),
            keys=index.tolist(),
        )

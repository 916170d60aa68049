"""How good sampled reasonings are while RecPO trains, which only a generated world can tell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from r2ec_fast.quickstart.reasoning import judge_reasoning
from r2ec_fast.quickstart.world import World

if TYPE_CHECKING:
    from r2ec_fast.data import RecDataset
    from r2ec_fast.packing.ragged import Rows
    from r2ec_fast.rollout import RolloutEngine, Rollouts
    from r2ec_fast.train.trainer import RecPOTrainer

FILE = "judgements.jsonl"


class JudgedEngine:
    """A rollout engine that passes everything on, and writes down what its samples are worth.

    Each step appends a line to ``path``: "step", and over its reasonings the share that are "right"
    and "well_formed" and the mean number of "steps". Greedy reasonings, those of evaluations, are
    not judged.
    """

    def __init__(self, trainer: RecPOTrainer, world: World, path: Path) -> None:
        self.engine: RolloutEngine = trainer.engine
        self.tokenizer, self.marker = trainer.model.tokenizer, trainer.model.prompts.emb_token
        self.dataset: RecDataset = trainer.data
        self.world, self.path = world, path

    def generate(
        self,
        prompts: Rows,
        *,
        user_keys: Sequence[int],
        num_generations: int,
        step: int = 0,
        greedy: bool = False,
        **settings: Any,
    ) -> Rollouts:
        """See `r2ec_fast.rollout.base.RolloutEngine`; ``user_keys`` are training examples."""
        rollouts = self.engine.generate(
            prompts,
            user_keys=user_keys,
            num_generations=num_generations,
            step=step,
            greedy=greedy,
            **settings,
        )
        if not greedy:
            self._judge(rollouts, np.repeat(user_keys, num_generations), step)
        return rollouts

    def _judge(self, rollouts: Rollouts, keys: np.ndarray, step: int) -> None:
        examples = self.dataset.train[keys]
        texts = self.tokenizer.batch_decode([row.tolist() for row in rollouts.tokens])
        found = [
            judge_reasoning(
                self.world,
                text.split(self.marker)[0],
                self.dataset.history(int(user), int(position), self.world.steps).items,
            )
            for text, user, position in zip(texts, examples.user, examples.position, strict=True)
        ]
        record = {
            "step": step,
            "right": float(np.mean([judgement.right for judgement in found])),
            "well_formed": float(np.mean([judgement.well_formed for judgement in found])),
            "steps": float(np.mean([judgement.steps for judgement in found])),
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


def read_judgements(directory: Path) -> list[dict[str, float]]:
    """One record a step, in order; a step that was done again after a stop counts once."""
    from r2ec_fast.report.plots import read_json_lines

    records = {record["step"]: record for record in read_json_lines(directory / FILE)}
    return [records[step] for step in sorted(records)]

"""The language warm-up of a generated world: what a pretrained model would bring along.

The model learns to write chains about its users' purchases: the relations between products, walks
of every length up to the world's, and both orders of reading the colours. It also learns that the
item head reads the product that was named last, in any colour. No purchase is a target, so nothing
says which order and how many steps tell what is bought next; that is left to RecPO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.quickstart.reasoning import write_chain
from r2ec_fast.quickstart.world import ORDERS, World
from r2ec_fast.utils.signals import RunStopped

if TYPE_CHECKING:
    from r2ec_fast.data import Reasonings, RecDataset
    from r2ec_fast.model.r2ec import R2ecModel

LONGEST_STEP = 4  # tokens of a chain's step, and of its end with the marker


@dataclass(frozen=True)
class WarmUp:
    """How long a warm-up is, and what it shows.

    Args:
        language_steps: optimiser steps on the words alone.
        item_steps: optimiser steps after these, on words and item head together.
        batch: users a step.
        learning_rate: peak of the first part; the second has half of it. Both end at 0.
        lengths: how often a chain has 0, 1, 2, ... steps, as shares of 1; at most one more than the
            world's steps. None: all lengths up to the world's alike.
    """

    language_steps: int = 300
    item_steps: int = 100
    batch: int = 32
    learning_rate: float = 2e-3
    lengths: Sequence[float] | None = None


def chain_reasonings(
    world: World,
    dataset: RecDataset,
    count: int,
    *,
    lengths: Sequence[float] | None = None,
    seed: int = 0,
) -> Reasonings:
    """``count`` chains about random training examples, each with the item that is read out after
    it: the product it ends at, in a random colour. ``lengths`` as in `WarmUp`.

    Raises ValueError for ``lengths`` that are not shares of the world's lengths.
    """
    shares = np.full(world.steps + 1, 1 / (world.steps + 1)) if lengths is None else lengths
    shares = np.asarray(shares, float)
    if not 1 <= len(shares) <= world.steps + 1 or abs(shares.sum() - 1) > 1e-6 or shares.min() < 0:
        raise ValueError(
            f"lengths: expected 1 to {world.steps + 1} shares that sum to 1, got {lengths}"
        )
    from r2ec_fast.data import Reasonings

    rng = np.random.default_rng([seed, 2])
    examples = dataset.train[rng.integers(0, len(dataset.train), count)]
    texts, items = [], []
    for history in Ragged.of(dataset.exclude(examples, world.steps)):
        chain = world.chain(
            history,
            steps=int(rng.choice(len(shares), p=shares)),
            order=ORDERS[rng.integers(len(ORDERS))],
        )
        texts.append(write_chain(chain))
        items.append(chain.end * world.colours + int(rng.integers(world.colours)))
    return Reasonings.of(dataset, examples, texts, items)


def warm_up(
    model: R2ecModel,
    world: World,
    dataset: RecDataset,
    settings: WarmUp,
    *,
    seed: int = 0,
    on_step: Callable[[dict[str, float]], object] | None = None,
) -> None:
    """Teach ``model``, which knows nothing yet, both of its heads; all its weights train.

    ``on_step`` gets the record of each step of `RecPOTrainer`, numbered through both parts. Raises
    RunStopped where SIGTERM came.
    """
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.train.trainer import RecPOTrainer

    def told(before: int) -> Callable[[dict[str, float]], object] | None:
        if on_step is None:
            return None
        return lambda record: on_step({**record, "step": before + record["step"]})

    # words first: an item head that reads words which mean nothing yet only slows them
    parts = (
        (settings.language_steps, 0.0, settings.learning_rate),
        (settings.item_steps, 1.0, settings.learning_rate / 2),
    )
    for part, (steps, item_weight, learning_rate) in enumerate(parts):
        count, lengths = steps * settings.batch, settings.lengths
        reasonings = chain_reasonings(world, dataset, count, lengths=lengths, seed=2 * seed + part)
        with TemporaryDirectory() as folder:
            config = RecPOConfig(
                output_dir=folder,
                objective="reasoning_sft",
                use_lora=False,
                train_embeddings=True,
                item_weight=item_weight,
                max_steps=steps,
                per_device_train_batch_size=settings.batch,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(30, steps // 4),
                max_completion_length=LONGEST_STEP * (world.steps + 2),
                index_scan="none",
                refresh_steps=0,
                eval_steps=0,
                eval_samples=1,
                save_steps=0,
                seed=seed,
            )
            before = settings.language_steps * part
            trainer = RecPOTrainer(
                model, dataset, config, reasonings=reasonings, on_step=told(before)
            )
            trainer.train()
        if trainer.stopped:
            raise RunStopped(f"the warm-up was stopped by SIGTERM after step {trainer.step}")

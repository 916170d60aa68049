"""The stages of the quick start: counting, the warm-up, direct training, RecPO, and what each is
measured by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2ec_fast.quickstart.world import World

if TYPE_CHECKING:
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.data import Examples, RecDataset
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.train.trainer import RecPOTrainer

    OnStep = Callable[[dict[str, float]], object]

# the rule's chain has 16 tokens; room for two steps more
MAX_COMPLETION_LENGTH = 24


@dataclass(frozen=True)
class Sizes:
    """How much the quick start trains; the defaults take about two minutes on an idle core.

    Args:
        world: catalog and users; its seed is replaced by the run's.
        hidden_size: of the model.
        layers: of the model.
        warmup_steps: optimiser steps of the warm-up.
        warmup_item_steps: the last ones of them, in which the item head learns to read reasonings.
        warmup_batch: records in a step of it.
        direct_steps: optimiser steps of the contrastive objective.
        direct_batch: users in a step of it.
        recpo_steps: optimiser steps of RecPO.
        recpo_batch: users in a step of it.
        generations: reasonings sampled for one user.
        test_examples: evaluated, a seeded sample.
    """

    world: World = field(default_factory=World)
    hidden_size: int = 128
    layers: int = 2
    warmup_steps: int = 400
    warmup_item_steps: int = 80
    warmup_batch: int = 32
    direct_steps: int = 500
    direct_batch: int = 48
    recpo_steps: int = 50
    recpo_batch: int = 24
    generations: int = 8
    test_examples: int = 500


def examples_of(dataset: RecDataset, sizes: Sizes, seed: int) -> Examples:
    """The test examples that every method is measured on."""
    from r2ec_fast.data.splits import sample_examples

    return sample_examples(dataset, "test", sizes.test_examples, seed)


def baselines(dataset: RecDataset, examples: Examples) -> dict[str, dict[str, float]]:
    """Metrics of the counting baselines."""
    from r2ec_fast.eval.baselines import counting_baselines
    from r2ec_fast.eval.metrics import ranking_metrics

    return {
        b.name: ranking_metrics(b.ranks(examples), users=examples.user)
        for b in counting_baselines(dataset)
    }


def warm_up(
    world: World, dataset: RecDataset, sizes: Sizes, on_step: OnStep | None = None
) -> R2ecModel:
    """A new model that has learned to write chains and to read items from them."""
    import torch

    from r2ec_fast.quickstart.language import new_model
    from r2ec_fast.quickstart.warmup import WarmUp
    from r2ec_fast.quickstart.warmup import warm_up as teach

    torch.manual_seed(world.seed)
    model = new_model(world, layers=sizes.layers, hidden_size=sizes.hidden_size)
    words = sizes.warmup_steps - sizes.warmup_item_steps
    settings = WarmUp(words, sizes.warmup_item_steps, sizes.warmup_batch)
    teach(model, world, dataset, settings, seed=world.seed, on_step=on_step)
    return model


def _config(output: Path, seed: int, sizes: Sizes, steps: int, **changes: Any) -> RecPOConfig:
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.train.checkpoint import checkpoints

    return RecPOConfig(
        output_dir=str(output),
        resume_from_checkpoint="latest" if checkpoints(output) else None,
        save_total_limit=1,
        save_steps=max(steps // 4, 1),
        eval_steps=max(steps // 4, 1),
        eval_samples=min(200, sizes.test_examples),
        max_completion_length=MAX_COMPLETION_LENGTH,
        # what is printed at the end says more about so small a run
        eval_direct=False,
        diagnostic_samples=0,
        index_scan="none",
        max_steps=steps,
        seed=seed,
        **changes,
    )


def direct_trainer(
    dataset: RecDataset, sizes: Sizes, seed: int, output: Path, on_step: OnStep | None = None
) -> RecPOTrainer:
    """Trains the whole warmed-up model to answer without a reasoning."""
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.train.trainer import RecPOTrainer

    config = _config(
        output / "direct",
        seed,
        sizes,
        sizes.direct_steps,
        objective="contrastive",
        use_lora=False,
        per_device_train_batch_size=sizes.direct_batch,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        refresh_steps=0,
    )
    model = R2ecModel.from_pretrained(str(output / "warmup"))
    return RecPOTrainer(model, dataset, config, on_step=on_step)


def recpo_trainer(
    world: World,
    dataset: RecDataset,
    sizes: Sizes,
    seed: int,
    output: Path,
    on_step: OnStep | None = None,
) -> RecPOTrainer:
    """Trains adapters of the warmed-up model by RecPO; its reasonings are judged."""
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.quickstart.judging import FILE, JudgedEngine
    from r2ec_fast.train.trainer import RecPOTrainer

    config = _config(
        output / "recpo",
        seed,
        sizes,
        sizes.recpo_steps,
        objective="recpo",
        per_device_train_batch_size=sizes.recpo_batch,
        num_generations=sizes.generations,
        lora_r=16,
        lora_alpha=32,
        learning_rate=1e-3,
        warmup_steps=4,
        temperature=1.0,
        top_k=0,
        refresh_steps=5,  # cheap for so small a catalog
    )
    model = R2ecModel.from_pretrained(str(output / "warmup"))
    trainer = RecPOTrainer(model, dataset, config, on_step=on_step)
    trainer.engine = JudgedEngine(trainer, world, output / "recpo" / FILE)
    return trainer


def evaluate(
    model: R2ecModel, dataset: RecDataset, examples: Examples, *, reasoning: bool
) -> dict[str, float]:
    """Metrics of ``model``, whose item table is encoded anew."""
    from r2ec_fast.eval.metrics import ranking_metrics
    from r2ec_fast.eval.ranking import rank_examples, transformers_engine
    from r2ec_fast.prompts.segments import PromptAssembler

    model.set_items(model.encode_items(dataset.data.catalog), scan="none")
    assembler = PromptAssembler(model.prompt_builder(dataset.data.catalog))
    ranks, _ = rank_examples(
        model,
        assembler,
        dataset,
        examples,
        engine=transformers_engine(model, assembler.builder) if reasoning else None,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    return ranking_metrics(ranks, users=examples.user)

"""The stages of the quick start: counting baselines, warm-up, contrastive training, RecPO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from r2ec_fast.quickstart.previous_world import Sizes, reasoning_text

if TYPE_CHECKING:
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.data import Examples, RecDataset
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.packing.ragged import Ragged
    from r2ec_fast.prompts.builder import PromptBuilder
    from r2ec_fast.train.trainer import RecPOTrainer
    from r2ec_fast.train.update import PolicyUpdate

NAMED_EVENTS = 3


def baselines(dataset: RecDataset, sizes: Sizes, seed: int) -> dict[str, dict[str, float]]:
    """Test metrics of the counting baselines."""
    from r2ec_fast.data.splits import sample_examples
    from r2ec_fast.eval.baselines import counting_baselines
    from r2ec_fast.eval.metrics import ranking_metrics

    examples = sample_examples(dataset, "test", sizes.test_examples, seed)
    return {
        b.name: ranking_metrics(b.ranks(examples), users=examples.user)
        for b in counting_baselines(dataset)
    }


# ---- language-model warm-up ---------------------------------------------------------------------


def warm_up(
    model: R2ecModel,
    dataset: RecDataset,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    learning_rate: float = 3e-3,
) -> list[tuple[float, float]]:
    """Teach the new model both of its heads at once, as a pretrained model would bring them along.

    Language: it reads histories, each followed by a reasoning made up from that history: brand,
    colour and product of items drawn among the latest events (no target enters). Which of them are
    worth naming is left to RecPO. Items: the contrastive objective, read out right after the prompt
    for one half of the users, and for the other after a reasoning in hindsight, which names the
    target's own brand and colour and the latest product: the item head learns to read a reasoning.

    Returns:
        For each step the mean negative log-probability of a token, and of the target in the batch.
    """
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.packing.ragged import Ragged
    from r2ec_fast.prompts.segments import PromptAssembler
    from r2ec_fast.train.update import PolicyUpdate

    rng = np.random.default_rng([seed, 1])
    builder = model.prompt_builder(dataset.data.catalog)
    assembler = PromptAssembler(builder)
    update = PolicyUpdate(model, RecPOConfig(objective="contrastive"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    losses = []
    for _ in range(steps):
        chosen = dataset.train[rng.integers(0, len(dataset.train), batch_size)]
        prompts = assembler.example_rows(dataset, chosen)
        # the latest items of each history, oldest first
        latest = Ragged.of(dataset.exclude(chosen, NAMED_EVENTS))
        guesses = [rng.choice(items, 3) for items in latest]
        reasonings = _reasonings(builder, guesses).append(builder.marker_ids)
        language = _language_step(model, prompts, reasonings)
        contrast = _item_step(update, builder, dataset, chosen, prompts, latest)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append((language, contrast))
    return losses


def _language_step(model: R2ecModel, prompts: Ragged, reasonings: Ragged) -> float:
    """Accumulate the gradient of next-token prediction; returns the loss."""
    import torch

    from r2ec_fast.packing.packer import pack_histories
    from r2ec_fast.packing.ragged import common_prefix
    from r2ec_kernels import linear_logprob

    # the instruction, which all prompts begin with, is computed once
    shared = common_prefix(prompts)
    histories = prompts.tail(shared)
    rows = histories.join(reasonings)
    (batch,) = pack_histories(
        [prompts[0][:shared]], rows, num_generations=len(rows), max_tokens=1, oversize="alone"
    )
    parts = np.stack([histories.lengths, reasonings.lengths], axis=1)
    of_reasoning = np.repeat(np.tile([False, True], len(rows)), parts.ravel())
    hidden = model(batch).index_select(0, batch.predict_from)
    log_prob = linear_logprob(hidden, model.lm_head_weight, batch.targets).log_prob
    # history and reasoning weigh the same, though a history has more tokens
    written = torch.from_numpy(of_reasoning)[batch.source]
    loss = -(log_prob[written].mean() + log_prob[~written].mean()) / 2
    loss.backward()
    return loss.item()


def _item_step(
    update: PolicyUpdate,
    builder: PromptBuilder,
    dataset: RecDataset,
    examples: Examples,
    prompts: Ragged,
    latest: Ragged,
) -> float:
    """Accumulate the gradient of the contrastive objective; returns the loss.

    The first half of the users is read out after a reasoning in hindsight, without its marker.
    """
    from r2ec_fast.packing.ragged import Ragged
    from r2ec_fast.train.batches import UserBatch

    targets, half = dataset.target(examples), len(examples) // 2
    hindsight = [
        (target, target, items[-1])
        for target, items in zip(targets[:half], latest[:half], strict=True)
    ]
    users = UserBatch(
        Ragged.stack([prompts[:half].join(_reasonings(builder, hindsight)), prompts[half:]]),
        targets,
        exclude=Ragged.of(dataset.exclude(examples)),
        keys=list(range(len(examples))),
    )
    items = np.unique(targets).tolist()
    rows = dict(zip(items, builder.items_ids(items), strict=True))
    return update.contrastive([users], rows, builder.marker_ids)["loss"]


def _reasonings(builder: PromptBuilder, named: Sequence[Sequence[int] | np.ndarray]) -> Ragged:
    """Token ids of reasonings that name (brand, colour, product) of items, one row each."""
    from r2ec_fast.packing.ragged import Ragged

    fields = builder.catalog.fields
    texts = [reasoning_text(*(fields.row(int(i), named=True) for i in items)) for items in named]
    return Ragged.of(builder.tokenizer(texts, add_special_tokens=False).input_ids)


# ---- contrastive and RecPO ----------------------------------------------------------------------


def _config(output: Path, seed: int, sizes: Sizes, **changes: Any) -> RecPOConfig:
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.train.checkpoint import checkpoints

    return RecPOConfig(
        output_dir=str(output),
        resume_from_checkpoint="latest" if checkpoints(output) else None,
        save_total_limit=1,
        eval_samples=min(200, sizes.test_examples),
        max_completion_length=24,
        index_scan="none",
        seed=seed,
        **changes,
    )


def contrastive_trainer(dataset: RecDataset, sizes: Sizes, seed: int, output: Path) -> RecPOTrainer:
    """Trains the whole warmed-up model in direct mode, without reasoning."""
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.train.trainer import RecPOTrainer

    model = R2ecModel.from_pretrained(str(output / "warmup"))
    config = _config(
        output / "contrastive",
        seed,
        sizes,
        objective="contrastive",
        use_lora=False,
        per_device_train_batch_size=sizes.batch,
        max_steps=sizes.contrastive_steps,
        eval_steps=max(sizes.contrastive_steps // 4, 1),
        save_steps=max(sizes.contrastive_steps // 4, 1),
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        refresh_steps=0,
    )
    return RecPOTrainer(model, dataset, config)


def recpo_trainer(dataset: RecDataset, sizes: Sizes, seed: int, output: Path) -> RecPOTrainer:
    """Trains adapters of the contrastive model by RecPO."""
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.train.trainer import RecPOTrainer

    model = R2ecModel.from_pretrained(str(output / "contrastive" / "model"))
    config = _config(
        output / "recpo",
        seed,
        sizes,
        objective="recpo",
        per_device_train_batch_size=sizes.recpo_batch,
        num_generations=sizes.generations,
        max_steps=sizes.recpo_steps,
        eval_steps=max(sizes.recpo_steps // 4, 1),
        save_steps=max(sizes.recpo_steps // 4, 1),
        # adapters, and a pull towards the model without them: so small a model forgets how to
        # write within a few steps of reward otherwise
        lora_r=16,
        lora_alpha=32,
        beta=0.5,
        learning_rate=1e-3,
        warmup_steps=4,
        temperature=1.0,
        top_k=8,
        # a table of much older rows makes the fresh rows of the targets look better than they are
        refresh_steps=4,
    )
    return RecPOTrainer(model, dataset, config)


def evaluate(trainer: RecPOTrainer, sizes: Sizes, *, reasoning: bool) -> dict[str, float]:
    """Metrics of a sample of the test examples, as `ranking_metrics` names them."""
    metrics = trainer.evaluate("test", reasoning=reasoning, samples=sizes.test_examples)
    return {key.removeprefix("eval_test_"): value for key, value in metrics.items()}

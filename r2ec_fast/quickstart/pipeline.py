"""The quick start: a recommender that reasons, trained from nothing on generated data.

A catalog and users are generated, a tokenizer and a small Qwen2 model are made for them, and the
whole path runs on the CPU without a network: language-model warm-up (the model learns to write a
short reasoning about the history), contrastive training, RecPO, evaluation beside the counting
baselines, recommendations. It shows that and how everything works; its numbers say nothing about
real data.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from r2ec_fast.prompts.builder import PromptConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.data import Catalog, RecDataset
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.packing.ragged import Ragged
    from r2ec_fast.prompts.builder import PromptBuilder

NOTICE = (
    "Everything below is GENERATED data: made-up items, made-up users whose next item follows a "
    "simple rule.\nIt shows that the whole path works; the numbers say nothing about real data."
)
PROMPTS = PromptConfig(window=3, item_fields=(), max_user_tokens=512)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 1024
THREADS = 2
SHOWN_USERS = 3
# a model that starts from random weights learns faster with a softer item head than 0.02
TEMPERATURE = 0.05
NAMED_EVENTS = 3


@dataclass(frozen=True)
class Sizes:
    """How much the quick start trains; the defaults take about three minutes on two cores.

    Args:
        users: generated users.
        hidden_size: of the model.
        layers: of the model.
        warmup_steps: optimiser steps of the language-model warm-up.
        contrastive_steps: optimiser steps of the contrastive objective.
        recpo_steps: optimiser steps of RecPO.
        batch: users in a step of warm-up and contrastive training.
        recpo_batch: users in a step of RecPO.
        generations: reasonings sampled for one user.
        test_examples: evaluated, a seeded sample.
    """

    users: int = 1200
    hidden_size: int = 128
    layers: int = 2
    warmup_steps: int = 160
    contrastive_steps: int = 30
    recpo_steps: int = 40
    batch: int = 48
    recpo_batch: int = 32
    generations: int = 4
    test_examples: int = 500


def run(
    output_dir: str | Path = "runs/quickstart", *, seed: int = 42, sizes: Sizes | None = None
) -> dict[str, dict[str, float]]:
    """Run the quick start and print what it does.

    Args:
        output_dir: gets `data/`, `contrastive/`, `recpo/` (each with its model and metrics.jsonl),
            `results.json` and `training.png`.
        seed: of data, model and training: the same seed gives the same numbers on one machine.
        sizes: how much to train.

    Returns:
        Method -> test metrics (`ranking_metrics`).
    """
    import torch

    sizes, output = sizes or Sizes(), Path(output_dir)
    started = time.perf_counter()
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    # one line a step is for long runs
    logging.getLogger("r2ec_fast").setLevel(logging.WARNING)
    _say(NOTICE)
    dataset = _generate(sizes, seed)
    dataset.save(output / "data")
    torch.manual_seed(seed)
    model = _new_model(dataset.data.catalog, sizes)
    _say(f"model: Qwen2, {sum(p.numel() for p in model.parameters()):,} parameters, random weights")
    rows = _baseline_rows(dataset, sizes, seed)

    clock = time.perf_counter()
    losses = warm_up(model, dataset, steps=sizes.warmup_steps, batch_size=sizes.batch, seed=seed)
    _say(
        f"warm-up: {len(losses)} steps, token loss {losses[0][0]:.2f} -> {losses[-1][0]:.2f}, item "
        f"loss {losses[0][1]:.2f} -> {losses[-1][1]:.2f}, {time.perf_counter() - clock:.0f} s"
    )
    rows["contrastive (direct)"] = _train_contrastive(model, dataset, sizes, seed, output)
    rows |= _train_recpo(dataset, sizes, seed, output)
    _report(rows, output, dataset)
    _say(f"total: {time.perf_counter() - started:.0f} s, written to {output}")
    return rows


# ---- data and model -----------------------------------------------------------------------------


def _generate(sizes: Sizes, seed: int) -> RecDataset:
    from r2ec_fast.data import make_splits
    from r2ec_fast.data.sources.synthetic import generate_interactions

    dataset = make_splits(generate_interactions(sizes.users, seed=seed))
    data = dataset.data
    _say(
        f"data: {data.num_users:,} users, {data.num_items:,} items, {data.num_events:,} events; "
        f"{len(dataset.train):,} / {len(dataset.valid):,} / {len(dataset.test):,} examples by time"
    )
    return dataset


def _new_model(catalog: Catalog, sizes: Sizes) -> R2ecModel:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from r2ec_fast.model.r2ec import R2ecModel

    tokenizer = train_tokenizer(catalog)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=3 * sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return R2ecModel(Qwen2ForCausalLM(config), tokenizer, temperature=TEMPERATURE, prompts=PROMPTS)


def train_tokenizer(catalog: Catalog, vocab_size: int = VOCABULARY) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on the catalog's text and the prompts' wording.

    It has a ChatML template; any text can be encoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    instructions = [PROMPTS.instruction(t) for t in (PROMPTS.user_template, PROMPTS.item_template)]
    chat = ["system user assistant\n", "d h min ago: [] ()", "Title: Description: "]
    text = [*instructions * 50, *chat * 50]
    for row in catalog.fields.iter_rows(named=True):
        text += [
            row["title"],
            f"[{row['title']}]",
            row["description"],
            reasoning_text(row, row, row),
        ]
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _baseline_rows(dataset: RecDataset, sizes: Sizes, seed: int) -> dict[str, dict[str, float]]:
    from r2ec_fast.data.splits import sample_examples
    from r2ec_fast.eval.baselines import counting_baselines
    from r2ec_fast.eval.metrics import ranking_metrics

    examples = sample_examples(dataset, "test", sizes.test_examples, seed)
    return {
        b.name: ranking_metrics(b.ranks(examples), users=examples.user)
        for b in counting_baselines(dataset)
    }


# ---- language-model warm-up ---------------------------------------------------------------------


def reasoning_text(brand: Mapping, color: Mapping, last: Mapping) -> str:
    """A short reasoning that names the brand, colour and product of (maybe different) items."""
    return (
        f"Something by {brand['brand']} in {color['color'].lower()} that goes with the "
        f"{last['kit'].lower()} {last['product'].lower()}."
    )


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
    from r2ec_fast.train.update import PolicyUpdate, UserBatch

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
        targets = dataset.target(chosen)
        prompts = assembler.example_rows(dataset, chosen)
        # the latest items of each history, oldest first
        latest = Ragged.of(dataset.exclude(chosen, NAMED_EVENTS))
        guesses = [rng.choice(items, 3) for items in latest]
        reasonings = _reasonings(builder, guesses).append(builder.marker_ids)
        language = _language_step(model, prompts, reasonings)
        half = batch_size // 2
        hindsight = [
            (target, target, items[-1])
            for target, items in zip(targets[:half], latest[:half], strict=True)
        ]
        users = UserBatch(
            Ragged.stack([prompts[:half].join(_reasonings(builder, hindsight)), prompts[half:]]),
            targets,
            exclude=Ragged.of(dataset.exclude(chosen)),
            keys=list(range(batch_size)),
        )
        items = np.unique(targets).tolist()
        rows = dict(zip(items, builder.items_ids(items), strict=True))
        contrast = update.contrastive([users], rows, builder.marker_ids)["loss"]
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


def _reasonings(builder: PromptBuilder, named: Sequence[Sequence[int] | np.ndarray]) -> Ragged:
    """Token ids of reasonings that name (brand, colour, product) of items, one row each."""
    from r2ec_fast.packing.ragged import Ragged

    fields = builder.catalog.fields
    texts = [reasoning_text(*(fields.row(int(i), named=True) for i in items)) for items in named]
    return Ragged.of(builder.tokenizer(texts, add_special_tokens=False).input_ids)


# ---- contrastive and RecPO ----------------------------------------------------------------------


def _config(output: Path, seed: int, sizes: Sizes, **changes: object) -> RecPOConfig:
    from r2ec_fast.config import RecPOConfig

    return RecPOConfig(
        output_dir=str(output),
        save_steps=0,
        eval_samples=min(200, sizes.test_examples),
        max_completion_length=24,
        index_scan="none",
        seed=seed,
        **changes,
    )


def _train_contrastive(
    model: R2ecModel, dataset: RecDataset, sizes: Sizes, seed: int, output: Path
) -> dict[str, float]:
    from r2ec_fast.train.trainer import RecPOTrainer

    clock = time.perf_counter()
    config = _config(
        output / "contrastive",
        seed,
        sizes,
        objective="contrastive",
        use_lora=False,
        per_device_train_batch_size=sizes.batch,
        max_steps=sizes.contrastive_steps,
        eval_steps=max(sizes.contrastive_steps // 4, 1),
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        refresh_steps=0,
    )
    trainer = RecPOTrainer(model, dataset, config)
    trainer.train()
    first, last = _ends(_logged(config.output_dir, "loss"))
    _say(
        f"contrastive: {config.max_steps} steps, loss {first:.2f} -> {last:.2f}, "
        f"{time.perf_counter() - clock:.0f} s"
    )
    return _test(trainer, sizes, reasoning=False)


def _train_recpo(
    dataset: RecDataset, sizes: Sizes, seed: int, output: Path
) -> dict[str, dict[str, float]]:
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.train.trainer import RecPOTrainer

    model = R2ecModel.from_pretrained(str(output / "contrastive" / "model"))
    clock = time.perf_counter()
    config = _config(
        output / "recpo",
        seed,
        sizes,
        objective="recpo",
        per_device_train_batch_size=sizes.recpo_batch,
        num_generations=sizes.generations,
        max_steps=sizes.recpo_steps,
        eval_steps=max(sizes.recpo_steps // 4, 1),
        # adapters, and a pull towards the model without them: so small a model forgets how to
        # write within a few steps of reward otherwise
        lora_r=16,
        lora_alpha=32,
        kl_weight=0.5,
        learning_rate=1e-3,
        warmup_steps=4,
        temperature=1.0,
        top_k=8,
        # a table of much older rows makes the fresh rows of the targets look better than they are
        refresh_steps=4,
    )
    trainer = RecPOTrainer(model, dataset, config)
    trainer.train()
    first, last = _ends(_logged(config.output_dir, "reward"))
    _say(
        f"RecPO: {config.max_steps} steps, mean reward of the first quarter {first:.3f}, "
        f"of the last {last:.3f}, {time.perf_counter() - clock:.0f} s"
    )
    return {
        "RecPO (direct)": _test(trainer, sizes, reasoning=False),
        "RecPO (reasoned)": _test(trainer, sizes, reasoning=True),
    }


def _test(trainer, sizes: Sizes, *, reasoning: bool) -> dict[str, float]:
    prefix = "eval_test_"
    metrics = trainer.evaluate("test", reasoning=reasoning, samples=sizes.test_examples)
    return {key.removeprefix(prefix): value for key, value in metrics.items()}


def _logged(run_dir: str | Path, key: str) -> list[float]:
    """The values that a run logged under `key`, in the order of its steps."""
    from r2ec_fast.report.plots import read_log

    return [record[key] for record in read_log(run_dir) if key in record]


def _ends(values: list[float]) -> tuple[float, float]:
    """Means of the first and of the last quarter."""
    quarter = max(len(values) // 4, 1)
    return float(np.mean(values[:quarter])), float(np.mean(values[-quarter:]))


# ---- what is shown ------------------------------------------------------------------------------


def _report(rows: dict[str, dict[str, float]], output: Path, dataset: RecDataset) -> None:
    from r2ec_fast.eval.metrics import metrics_table
    from r2ec_fast.report.plots import plot_runs
    from r2ec_fast.serve.display import show_recommendations
    from r2ec_fast.serve.recommender import Recommender

    _say(f"\n{metrics_table(rows)}")
    (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    runs = {name: output / name for name in ("contrastive", "recpo")}
    plot_runs(runs, output / "training.png", note="generated data")
    recommender = Recommender.from_pretrained(output / "recpo" / "model", data=dataset)
    users = dataset.data.users.decode(dataset.test.user[:SHOWN_USERS])
    results = recommender.recommend(users, k=5, max_completion_length=24)
    for user, result in zip(users, results, strict=True):
        show_recommendations(f"user {user}", result)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

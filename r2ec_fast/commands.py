"""The commands of `r2ec-fast`: one function each, its docstring is the help of its settings.

What a user can mend is an exception; `cli` turns it into one line.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2ec_fast.eval.command import evaluate as evaluate
from r2ec_fast.serve.command import serve as serve
from r2ec_fast.serve.display import show_recommendations
from r2ec_fast.utils.atomic_files import check_directory, check_writable, write_whole
from r2ec_fast.utils.terminal import say

if TYPE_CHECKING:
    from r2ec_fast.config import ModelConfig, RecPOConfig
    from r2ec_fast.data import RecDataset
    from r2ec_fast.model.r2ec import R2ecModel

SHOWN_TEXTS = 5  # of the reasonings that are written


def prepare(source: str, **settings: Any) -> None:
    """Read interactions, split them, write a data set, and show what was read, dropped and kept."""
    from r2ec_fast.data import prepare as sources

    if source == "check":
        say(sources.check_amazon(**settings).text)
        return
    prepared = getattr(sources, f"prepare_{source}")(**settings)
    say(prepared.report)
    say(f"wrote {prepared.directory}")


def reasonings(data: str, output_file: str, config: RecPOConfig) -> None:
    """Write the reasonings that `train` makes by the templates of the same settings, as JSONL."""
    from r2ec_fast.data import ReasoningTemplates, RecDataset

    if not isinstance(config.reasonings, ReasoningTemplates):
        raise ValueError(f"reasonings: expected templates, got {config.reasonings!r}")
    check_writable(output_file, "output_file")
    dataset = RecDataset.load(data)
    records = config.reasonings.fill(dataset, config.seed)
    records.write(output_file, dataset, "output_file")
    for place in range(0, len(records), -(-len(records) // SHOWN_TEXTS)):
        say(records.texts[place])
    say(f"wrote {len(records):,} reasonings to {output_file}")


def train(data: str, model: ModelConfig, config: RecPOConfig) -> dict[str, float]:
    """Train a model on a prepared data set; returns and prints its validation metrics."""
    from r2ec_fast.data import RecDataset
    from r2ec_fast.train.trainer import RecPOTrainer

    dataset = RecDataset.load(data)
    trainer = RecPOTrainer(_model_to_train(model, dataset), dataset, config)
    metrics = trainer.train()
    for key, value in metrics.items():
        say(f"{key}: {value:.4f}")
    say(f"wrote {config.output_dir}")
    return metrics


def diagnose(
    model: str,
    data: str,
    *,
    split: str = "valid",
    samples: int = 256,
    num_generations: int = 4,
    temperature: float = 1.5,
    top_k: int = 200,
    max_completion_length: int = 512,
    exclude_window: bool = False,
    max_tokens: int = 16384,
    batch_size: int = 64,
    seed: int = 42,
    dtype: str = "auto",
    gguf_file: str | None = None,
    output_file: str | None = None,
) -> dict[str, float]:
    """Print whether a model's reasoning pays, and whether RecPO has anything to choose from.

    Args:
        model: directory that a training run exported, or any causal language model (untrained: its
            item table is then encoded first).
        data: prepared data set (directory).
        split: train, valid or test.
        samples: examples, a seeded sample; 0 = all. Each costs num_generations + 1 reasonings.
        num_generations: sampled reasonings an example, as in training.
        temperature: of the sampling, as in training.
        top_k: sample among the k likeliest tokens, as in training; 0 = all.
        max_completion_length: longest reasoning (tokens).
        exclude_window: exclude only the events shown in the prompt, not all earlier ones.
        max_tokens: token budget of a forward pass.
        batch_size: users computed together.
        seed: of the sample, the sampling, and whose reasoning is swapped with whose.
        dtype: "auto", "float32", "bfloat16" or "float16".
        gguf_file: read the weights from this GGUF file of the model's directory.
        output_file: also write the figures as JSON.
    """
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.data import RecDataset
    from r2ec_fast.data.splits import sample_examples
    from r2ec_fast.eval.ranking import transformers_engine
    from r2ec_fast.eval.readiness import advice, concerns, readiness_table
    from r2ec_fast.eval.reasoning import ReasoningProbe
    from r2ec_fast.model.loading import give_items, load_model
    from r2ec_fast.prompts.segments import PromptAssembler

    config = RecPOConfig(
        num_generations=num_generations,
        temperature=temperature,
        top_k=top_k,
        max_completion_length=max_completion_length,
        seed=seed,
    )
    check_writable(output_file, "output_file")
    dataset = RecDataset.load(data)
    examples = sample_examples(dataset, split, samples, seed)
    if len(examples) == 0:
        raise ValueError(f"split: {split} of {data} holds no example")
    r2ec = load_model(model, dtype=dtype, gguf_file=gguf_file)
    give_items(r2ec, dataset.data.catalog, max_tokens)
    builder = r2ec.prompt_builder(dataset.data.catalog)
    probe = ReasoningProbe(
        r2ec,
        PromptAssembler(builder),
        dataset,
        transformers_engine(r2ec, builder),
        config,
        max_tokens=max_tokens,
        exclude_window=exclude_window,
        batch_size=batch_size,
    )
    figures = probe.figures(examples)
    say(readiness_table(figures))
    if output_file is not None:
        write_whole(output_file, json.dumps(figures, indent=2) + "\n", "output_file")
    if found := concerns(figures):
        say("\n" + advice(found))
    return figures


def recommend(
    model: str,
    *,
    data: str | None = None,
    users: list[str] | None = None,
    items: list[str] | None = None,
    k: int = 10,
    reasoning: bool = True,
    include: list[str] | None = None,
    filter: dict[str, Any] | None = None,
    max_completion_length: int = 512,
) -> None:
    """Recommend items to users of a data set, or for a list of items.

    Args:
        model: directory that a training run exported.
        data: prepared data set (directory), needed for `users`.
        users: user ids, e.g. `--users '[u1, u2]'`; all that is known of them is their history.
        items: one history: item ids or titles, oldest first, e.g. `--items '[i1, i7]'`.
        k: items a user.
        reasoning: write a reasoning first.
        include: ids or titles of the only items that may be recommended.
        filter: only items whose columns fit, e.g. `--filter '{genres: [Comedy, Drama]}'` or
            `--filter '{price: {max: 20}}'`.
        max_completion_length: longest reasoning (tokens).
    """
    from r2ec_fast.serve.recommender import Recommender

    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if not users and not items:
        raise ValueError("users, items: give user ids or a list of items")
    if users and data is None:
        raise ValueError("data: needed to look up users by id")
    histories = [*(users or []), *([items] if items else [])]
    names = [*(f"user {user}" for user in users or []), *(["the items given"] if items else [])]
    recommender = Recommender.from_pretrained(model, data=data)
    results = recommender.recommend(
        histories,
        k,
        reasoning,
        include=include,
        filter=filter,
        max_completion_length=max_completion_length,
    )
    for name, result in zip(names, results, strict=True):
        show_recommendations(name, result)


def index(
    model: str,
    data: str,
    *,
    output_dir: str | None = None,
    scan: str = "auto",
    max_tokens: int = 16384,
    dtype: str = "auto",
    gguf_file: str | None = None,
) -> None:
    """Encode a data set's whole catalog and store it beside the model, ready to recommend.

    Args:
        model: directory of a model, or a name on the Hub.
        data: prepared data set (directory) whose catalog is encoded.
        output_dir: where the model with its new table is written; default: `model` itself.
        scan: first pass of the item index: "auto", "none", "fp16", "bf16" or "int8".
        max_tokens: token budget of a forward pass.
        dtype: "auto", "float32", "bfloat16" or "float16".
        gguf_file: read the weights from this GGUF file of the model's directory.
    """
    from r2ec_fast.data import RecDataset
    from r2ec_fast.model.loading import load_model

    target = output_dir or model
    if output_dir is None and not Path(model).is_dir():
        raise ValueError(f"output_dir: needed, because {model!r} is not a directory")
    check_directory(target, "output_dir")
    catalog = RecDataset.load(data).data.catalog
    r2ec = load_model(model, dtype=dtype, gguf_file=gguf_file)
    r2ec.set_items(r2ec.encode_items(catalog, max_tokens=max_tokens), scan=scan)
    if output_dir is None and gguf_file is None:
        r2ec.save_items(target, catalog)  # the weights are there already
    else:
        r2ec.save_pretrained(target, catalog)
    say(f"encoded {len(catalog):,} items, wrote {target}")


def report(run_dir: str) -> None:
    """Write one self-contained HTML file about a training run: curves, numbers, reasonings.

    Args:
        run_dir: output directory of the run; gets report.html.
    """
    from r2ec_fast.report.html import write_report

    say(f"wrote {write_report(run_dir)}")


def quickstart(output_dir: str = "runs/quickstart", seed: int = 42) -> None:
    """Train and evaluate a small recommender on a generated catalog, offline, on the CPU.

    Args:
        output_dir: where models, metrics and the picture are written.
        seed: of the catalog, the model and the training.
    """
    from r2ec_fast.quickstart.pipeline import run

    run(output_dir, seed=seed)


# ---- what the commands share --------------------------------------------------------------------


def _model_to_train(config: ModelConfig, dataset: RecDataset) -> R2ecModel:
    """The model with the configured settings. One left at its default stays as a model that was
    trained before has it; the category's words are then the data set's."""
    from r2ec_fast.config import ModelConfig
    from r2ec_fast.model.liger import apply_liger_kernel
    from r2ec_fast.model.loading import load_model

    model = load_model(config.name_or_path, dtype=config.dtype, gguf_file=config.gguf_file)
    if config.use_liger_kernel:
        apply_liger_kernel(model.backbone)
    usual = ModelConfig()
    if config.similarity != usual.similarity:
        model.similarity = config.similarity
    if config.item_temperature != usual.item_temperature:
        model.temperature = config.item_temperature
    if config.prompts != usual.prompts:
        model.prompts = config.prompts
    words = dataset.settings.get("prompt", {})
    if words and model.prompts.category == usual.prompts.category:
        model.prompts = dataclasses.replace(model.prompts, **words)
    model.index = None  # its rows may be another catalog's
    return model

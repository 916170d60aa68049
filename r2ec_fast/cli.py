"""The command line, `r2ec-fast`: quickstart, prepare, train, report, evaluate, recommend, index.

Every setting of a command can stand in a YAML file (`--config`) and be overridden behind it. What a
user can mend ends with one line on stderr and exit status 2; R2EC_TRACEBACK=1 shows where it arose.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from r2ec_fast.serve.display import show_recommendations
from r2ec_fast.utils.atomic_files import check_writable, replaced_file

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from r2ec_fast.config import ModelConfig, RecPOConfig
    from r2ec_fast.data import RecDataset
    from r2ec_fast.model.r2ec import R2ecModel

PROG = "r2ec-fast"
TRACEBACK_VARIABLE = "R2EC_TRACEBACK"
USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError)
MODES = ("direct", "reasoned")


class UsageError(ValueError):
    """Arguments that the parser refuses."""


class _Parser(ArgumentParser):
    """A parser whose errors are exceptions: the caller prints one line, not the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(message) from ex

    def dump(self, namespace: Namespace, *arguments: Any, **settings: Any) -> str:
        """What `--print_config` prints: old names of settings become the present ones."""
        from r2ec_fast.config import RENAMED

        namespace = namespace.clone()
        for old, new in RENAMED.items():
            if old in namespace:
                namespace[new.name] = new.now(old, namespace.pop(old))
        return super().dump(namespace, *arguments, **settings)


# ---- commands: one function each, its docstring is the help of its settings ---------------------


def prepare(source: str, **settings: object) -> None:
    """Read interactions, split them, write a data set, and show what was read, dropped and kept."""
    from r2ec_fast.data import prepare as sources

    if source == "check":
        _say(sources.check_amazon(**settings).text)
        return
    prepared = getattr(sources, f"prepare_{source}")(**settings)
    _say(prepared.report)
    _say(f"wrote {prepared.directory}")


def train(data: str, model: ModelConfig, config: RecPOConfig) -> dict[str, float]:
    """Train a model on a prepared data set; returns and prints its validation metrics."""
    from r2ec_fast.data import RecDataset
    from r2ec_fast.train.trainer import RecPOTrainer

    dataset = RecDataset.load(data)
    trainer = RecPOTrainer(_model_to_train(model, dataset), dataset, config)
    metrics = trainer.train()
    for key, value in metrics.items():
        _say(f"{key}: {value:.4f}")
    _say(f"wrote {config.output_dir}")
    return metrics


def evaluate(
    model: str,
    data: str,
    *,
    split: str = "test",
    modes: list[str] = list(MODES),  # noqa: B006 (jsonargparse shows it; it is never changed)
    samples: int = 0,
    baselines: bool = True,
    exclude_window: bool = False,
    max_completion_length: int = 512,
    max_tokens: int = 16384,
    batch_size: int = 64,
    seed: int = 42,
    dtype: str = "auto",
    gguf_file: str | None = None,
    output_file: str | None = None,
    ranks_file: str | None = None,
    compare_with: str | None = None,
) -> dict[str, dict[str, float]]:
    """Rank the whole catalog for the examples of a split and print hit_rate, ndcg and mrr.

    Args:
        model: directory that a training run exported, or any causal language model (untrained: its
            item table is then encoded first).
        data: prepared data set (directory).
        split: train, valid or test.
        modes: any of direct (no reasoning) and reasoned (greedy reasoning first).
        samples: examples, a seeded sample; 0 = all.
        baselines: also popularity, Markov-1 and ItemKNN, on the same examples.
        exclude_window: exclude only the events shown in the prompt, not all earlier ones.
        max_completion_length: longest reasoning (tokens).
        max_tokens: token budget of a forward pass.
        batch_size: users computed together.
        seed: of the sample.
        dtype: "auto", "float32", "bfloat16" or "float16".
        gguf_file: read the weights from this GGUF file of the model's directory.
        output_file: also write the metrics as JSON.
        ranks_file: also write every example's rank by every method, as CSV.
        compare_with: ranks_file of another evaluation of the same examples; prints how much better
            each method is now, by the examples' own differences.
    """
    from r2ec_fast.data import RecDataset
    from r2ec_fast.data.splits import sample_examples
    from r2ec_fast.eval.baselines import counting_baselines
    from r2ec_fast.eval.comparison import check_examples, load_ranks, ranks_table
    from r2ec_fast.eval.ranking import rank_examples, transformers_engine
    from r2ec_fast.prompts.segments import PromptAssembler

    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"modes: expected any of {', '.join(MODES)}, got {mode!r}")
    check_writable(output_file, "output_file")
    check_writable(ranks_file, "ranks_file")
    before = None if compare_with is None else load_ranks(compare_with, "compare_with")
    dataset = RecDataset.load(data)
    examples = sample_examples(dataset, split, samples, seed)
    if len(examples) == 0:
        raise ValueError(f"split: {split} of {data} holds no example")
    if before is not None:
        check_examples(ranks_table(dataset, examples, {}), before, "compare_with")
    r2ec = _load_model(model, dtype=dtype, gguf_file=gguf_file)
    _check_table(r2ec, dataset, model)
    if r2ec.index is None:
        r2ec.set_items(r2ec.encode_items(dataset.data.catalog, max_tokens=max_tokens))
    builder = r2ec.prompt_builder(dataset.data.catalog)
    engine = transformers_engine(r2ec, builder)
    assembler = PromptAssembler(builder)
    ranks: dict[str, np.ndarray] = {}
    if baselines:
        window = r2ec.prompts.window if exclude_window else None
        for baseline in counting_baselines(dataset):
            ranks[baseline.name] = baseline.ranks(examples, window=window)
    for mode in modes:
        ranks[mode], _ = rank_examples(
            r2ec,
            assembler,
            dataset,
            examples,
            engine=engine if mode == "reasoned" else None,
            max_completion_length=max_completion_length,
            max_tokens=max_tokens,
            exclude_window=exclude_window,
            batch_size=batch_size,
        )
    return _report_ranks(ranks_table(dataset, examples, ranks), before, output_file, ranks_file)


def _report_ranks(
    table: pl.DataFrame,
    before: pl.DataFrame | None,
    output_file: str | None,
    ranks_file: str | None,
) -> dict[str, dict[str, float]]:
    from r2ec_fast.eval.comparison import differences, methods_of, save_ranks
    from r2ec_fast.eval.metrics import metrics_table, ranking_metrics

    users = table["user_id"].to_numpy()
    rows = {m: ranking_metrics(table[m].to_numpy(), users=users) for m in methods_of(table)}
    _say(metrics_table(rows))
    if ranks_file is not None:
        save_ranks(table, ranks_file, "ranks_file")
    if output_file is not None:
        _write_json(Path(output_file), rows)
    if compared := differences(table, before, "compare_with"):
        _say("\n" + metrics_table(compared, differences=True))
    return rows


def recommend(
    model: str,
    *,
    data: str | None = None,
    users: list[str] | None = None,
    items: list[str] | None = None,
    k: int = 10,
    reasoning: bool = True,
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
        histories, k, reasoning, max_completion_length=max_completion_length
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

    target = output_dir or model
    if output_dir is None and not Path(model).is_dir():
        raise ValueError(f"output_dir: needed, because {model!r} is not a directory")
    catalog = RecDataset.load(data).data.catalog
    r2ec = _load_model(model, dtype=dtype, gguf_file=gguf_file)
    r2ec.set_items(r2ec.encode_items(catalog, max_tokens=max_tokens), scan=scan)
    r2ec.save_pretrained(target, catalog)
    _say(f"encoded {len(catalog):,} items, wrote {target}")


def report(run_dir: str) -> None:
    """Write one self-contained HTML file about a training run: curves, numbers, reasonings.

    Args:
        run_dir: output directory of the run; gets report.html.
    """
    from r2ec_fast.report.html import write_report

    _say(f"wrote {write_report(run_dir)}")


def quickstart(output_dir: str = "runs/quickstart", seed: int = 42) -> None:
    """Train and evaluate a small recommender on a generated catalog, offline, on the CPU.

    Args:
        output_dir: where models, metrics and the picture are written.
        seed: of the catalog, the model and the training.
    """
    from r2ec_fast.quickstart.pipeline import run

    run(output_dir, seed=seed)


# ---- what the commands share --------------------------------------------------------------------


def _load_model(name_or_path: str, *, dtype: str, gguf_file: str | None) -> R2ecModel:
    import torch

    from r2ec_fast.model.r2ec import R2ecModel

    names = {"dtype": dtype} | ({} if gguf_file is None else {"gguf_file": gguf_file})
    try:
        model = R2ecModel.from_pretrained(name_or_path, **names)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"model: cannot load {name_or_path!r}: {reason}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def _model_to_train(config: ModelConfig, dataset: RecDataset) -> R2ecModel:
    """The model with the configured settings. One left at its default stays as a model that was
    trained before has it; the category's words are then the data set's."""
    from r2ec_fast.config import ModelConfig

    model = _load_model(config.name_or_path, dtype=config.dtype, gguf_file=config.gguf_file)
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


def _check_table(model: R2ecModel, dataset: RecDataset, name: str) -> None:
    if model.index is not None and len(model.index) != len(dataset.data.catalog):
        raise ValueError(
            f"data: {name} holds a table of {len(model.index)} items, "
            f"the data set has {len(dataset.data.catalog)}; run `{PROG} index` first"
        )


def _quiet_progress_bars() -> None:
    # transformers draws them into log files too; tqdm's own are shown on a terminal only
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def _write_json(path: Path, value: object) -> None:
    with replaced_file(path, "output_file") as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# ---- parsing ------------------------------------------------------------------------------------


def build_parser() -> ArgumentParser:
    """The parser of all commands. Settings, defaults and help come from signatures and
    docstrings.
    """
    from r2ec_fast.config import RENAMED, ModelConfig, RecPOConfig
    from r2ec_fast.data import prepare as sources

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=PROG, description="R2ec: a large recommender model that reasons.")
    commands = parser.add_subcommands(dest="command")

    def command(name: str, text: str, group: object = commands) -> _Parser:
        sub = _Parser(description=text)
        sub.add_argument(
            "--config", action="config", help="YAML file with settings of the command."
        )
        group.add_subcommand(name, sub, help=text)
        return sub

    sub = command("quickstart", _summary(quickstart))
    sub.add_function_arguments(quickstart, as_positional=False)
    text = "Read interactions, split them and write a data set."
    kinds = _Parser(description=text)
    commands.add_subcommand("prepare", kinds, help=text)
    kinds = kinds.add_subcommands(dest="source")
    for name, function in (
        ("generic", sources.prepare_generic),
        ("movielens", sources.prepare_movielens),
        ("amazon", sources.prepare_amazon),
        ("check", sources.check_amazon),
    ):
        command(name, _summary(function), kinds).add_function_arguments(
            function, as_positional=False
        )
    sub = command("train", "Train a model on a prepared data set.")
    sub.add_argument("--data", type=str, required=True, help="Prepared data set (directory).")
    sub.add_class_arguments(ModelConfig, "model", as_positional=False)
    sub.add_class_arguments(RecPOConfig, as_positional=False)
    kinds_of = get_type_hints(RecPOConfig)
    for old, new in RENAMED.items():  # taken, not shown
        kind = str if new.values else kinds_of[new.name]
        sub.add_argument(f"--{old}", type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    sub = command("report", _summary(report))
    sub.add_function_arguments(report, as_positional=True)
    for name, function in (("evaluate", evaluate), ("recommend", recommend), ("index", index)):
        command(name, _summary(function)).add_function_arguments(function, as_positional=False)
    return parser


def run_command(arguments: Sequence[str] | None = None) -> None:
    """Parse and run one command; errors are exceptions."""
    from r2ec_fast.config import RENAMED, ModelConfig, RecPOConfig
    from r2ec_fast.prompts.builder import PromptConfig

    parser = build_parser()
    settings = parser.parse_args(arguments)
    _quiet_progress_bars()
    name = settings.command
    if name == "prepare":
        settings = settings.prepare
        values = _values(settings[settings.source])
        prepare(settings.source, **values)
    elif name == "train":
        values = _values(settings.train)
        if any(old in values for old in RENAMED):  # then a new one must have been given to count
            values = _values(parser.parse_args(arguments, defaults=False).train)
        data, model = values.pop("data"), values.pop("model", {})
        prompts = PromptConfig(**model.pop("prompts", {}))
        train(data, ModelConfig(**model, prompts=prompts), RecPOConfig(**values))
    else:
        functions = {
            "quickstart": quickstart,
            "evaluate": evaluate,
            "recommend": recommend,
            "index": index,
            "report": report,
        }
        functions[name](**_values(settings[name]))


def _values(settings: Namespace) -> dict:
    values = settings.as_dict()
    values.pop("config", None)
    return values


def _summary(function) -> str:
    return function.__doc__.strip().splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (2 for a mistake that the user can mend)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("r2ec_fast").setLevel(logging.INFO)
    try:
        run_command(arguments)
    except USER_ERRORS as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            raise
        message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        sys.stderr.write(f"{PROG}: error: {message}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROG}: interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

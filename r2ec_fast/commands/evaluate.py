"""`r2ec-fast evaluate`; its docstring is the help of its settings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from r2ec_fast.utils.atomic_files import check_writable, write_whole
from r2ec_fast.utils.terminal import say

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from r2ec_fast.data import Examples, RecDataset
    from r2ec_fast.eval.evaluation import Evaluation

MODES = ("direct", "reasoned")


def evaluate(
    *,
    data: str,
    model: str | None = None,
    split: str = "test",
    modes: str | list[str] = "direct,reasoned",
    samples: int = 0,
    baselines: bool | str | list[str] = True,
    baseline_settings: dict[str, dict[str, Any]] = {},  # noqa: B006 (jsonargparse shows it; it is never changed)
    beyond_accuracy: bool = True,
    filter: dict[str, Any] | None = None,
    exclude_window: bool = False,
    max_completion_length: int = 512,
    max_tokens: int = 16384,
    batch_size: int = 64,
    seed: int = 42,
    allow_non_finite: bool = False,
    dtype: str = "auto",
    gguf_file: str | None = None,
    output_file: str | None = None,
    ranks_file: str | None = None,
    compare_with: str | None = None,
) -> dict[str, dict[str, float]]:
    """Rank the whole catalog for the examples of a split and print hit_rate, ndcg and mrr.

    Args:
        data: prepared data set (directory).
        model: directory that a training run exported, or any causal language model (untrained: its
            item table is then encoded first). Without one only the baselines are evaluated.
        split: train, valid or test.
        modes: any of direct (no reasoning) and reasoned (greedy reasoning first), as a list or
            separated by commas.
        samples: examples, a seeded sample; 0 = all.
        baselines: on the same examples: counting (or true), all, none (or false), or any of
            popularity, markov-1, item-knn, als, bpr, sasrec, esasrec, sasrec-text. All but the
            first three need the extra `baselines`, and are trained first.
        baseline_settings: of the trained baselines, e.g. {sasrec: {epochs: 20, seed: 1}}.
        beyond_accuracy: also coverage, novelty, diversity and popularity of the ten best items, and
            ndcg by length of the history and popularity of the target, cold targets among them.
        filter: rank among the items whose columns fit, e.g. `{genres: [Comedy, Drama]}` or
            `{year: {min: 2000}}`, on the examples whose target is one of them.
        exclude_window: exclude only the events shown in the prompt, not all earlier ones.
        max_completion_length: longest reasoning (tokens).
        max_tokens: token budget of a forward pass.
        batch_size: users computed together.
        seed: of the sample.
        allow_non_finite: rank the targets of states that hold NaN or infinity last, instead of an
            error.
        dtype: "auto", "float32", "bfloat16" or "float16".
        gguf_file: read the weights from this GGUF file of the model's directory.
        output_file: also write the metrics, the paired differences, and what the baselines were
            fitted with, as JSON.
        ranks_file: also write every example's rank by every method, as CSV.
        compare_with: ranks_file of another evaluation of the same examples; prints how much better
            each method is now, by the examples' own differences.
    """
    from r2ec_fast.data import RecDataset
    from r2ec_fast.data.filters import matching
    from r2ec_fast.data.splits import sample_examples
    from r2ec_fast.eval.baseline_choice import (
        checked_settings,
        chosen_baselines,
        fitted_baselines,
    )
    from r2ec_fast.eval.comparison import check_examples, load_ranks, ranks_table
    from r2ec_fast.eval.evaluation import Evaluation
    from r2ec_fast.eval.ranking import transformers_engine
    from r2ec_fast.model.loading import give_items, load_model
    from r2ec_fast.prompts.segments import PromptAssembler

    chosen = _chosen_modes(modes)
    names = chosen_baselines(baselines)
    settings = checked_settings(names, baseline_settings)
    _check_methods(model, names, exclude_window)
    check_writable(output_file, "output_file")
    check_writable(ranks_file, "ranks_file")
    before = None if compare_with is None else load_ranks(compare_with, "compare_with")
    dataset = RecDataset.load(data)
    examples = sample_examples(dataset, split, samples, seed)
    if len(examples) == 0:
        raise ValueError(f"split: {split} of {data} holds no example")
    include = None
    if filter is not None:
        include = matching(dataset.data.catalog.fields, filter).to_numpy()
        examples = _with_targets_in(dataset, examples, include)
    if before is not None:
        check_examples(ranks_table(dataset, examples, {}), before, "compare_with")
    r2ec = None if model is None else load_model(model, dtype=dtype, gguf_file=gguf_file)
    if r2ec is not None:
        give_items(r2ec, dataset.data.catalog, max_tokens)
    window = r2ec.prompts.window if r2ec is not None and exclude_window else None
    evaluation = Evaluation(dataset, examples, beyond_accuracy, include)
    for baseline in fitted_baselines(dataset, names, settings):
        evaluation.add_baseline(baseline, window)
    if r2ec is not None:
        builder = r2ec.prompt_builder(dataset.data.catalog)
        engine = transformers_engine(r2ec, builder)
        for mode in chosen:
            evaluation.add_model(
                mode,
                r2ec,
                PromptAssembler(builder),
                engine=engine if mode == "reasoned" else None,
                max_completion_length=max_completion_length,
                max_tokens=max_tokens,
                exclude_window=exclude_window,
                batch_size=batch_size,
                allow_non_finite=allow_non_finite,
            )
    return _report(evaluation, before, output_file, ranks_file)


def _with_targets_in(dataset: RecDataset, examples: Examples, include: np.ndarray) -> Examples:
    """The examples whose targets are among the items, bool [N]."""
    kept = examples[include[dataset.target(examples)]]
    if len(kept) == 0:
        raise ValueError(
            f"filter: {int(include.sum()):,} of {len(include):,} items fit, and no example's target"
        )
    say(
        f"filter: {int(include.sum()):,} of {len(include):,} items fit, and the targets of "
        f"{len(kept):,} of {len(examples):,} examples\n"
    )
    return kept


def _chosen_modes(modes: str | list[str]) -> list[str]:
    """A list, or names separated by commas; each once."""
    names = [name.strip() for name in modes.split(",")] if isinstance(modes, str) else modes
    for name in names:
        if name not in MODES:
            raise ValueError(f"modes: expected any of {', '.join(MODES)}, got {name!r}")
    return list(dict.fromkeys(names))


def _check_methods(model: str | None, baselines: list[str], exclude_window: bool) -> None:
    if model is None and not baselines:
        raise ValueError("model, baselines: expected a model or baselines, got neither")
    if model is None and exclude_window:
        raise ValueError("exclude_window: needs a model, which says how many events are shown")


def _report(
    evaluation: Evaluation,
    before: pl.DataFrame | None,
    output_file: str | None,
    ranks_file: str | None,
) -> dict[str, dict[str, float]]:
    from r2ec_fast.eval.comparison import differences, save_ranks
    from r2ec_fast.eval.metrics import metrics_table

    rows, ranks = evaluation.metrics(), evaluation.ranks()
    say(evaluation.tables(rows))
    if ranks_file is not None:
        save_ranks(ranks, ranks_file, "ranks_file")
    if compared := differences(ranks, before, "compare_with"):
        say("\n" + metrics_table(compared, differences=True))
    if output_file is not None:
        text = json.dumps(rows | compared | {"baselines": evaluation.fitted}, indent=2)
        write_whole(output_file, text + "\n", "output_file")
    return rows | compared

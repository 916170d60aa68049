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
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from r2ec_fast.quickstart import previous_world as world
from r2ec_fast.quickstart import stages
from r2ec_fast.quickstart.previous_world import Sizes
from r2ec_fast.quickstart.progress import Progress
from r2ec_fast.utils.signals import RunStopped, sigterm_raises
from r2ec_fast.utils.terminal import say

if TYPE_CHECKING:
    from r2ec_fast.data import RecDataset
    from r2ec_fast.train.trainer import RecPOTrainer

NOTICE = (
    "Everything below is GENERATED data: made-up items, made-up users whose next item follows a "
    "simple rule.\nIt shows that the whole path works; the numbers say nothing about real data."
)
THREADS = 2
SHOWN_USERS = 3


def run(
    output_dir: str | Path = "runs/quickstart", *, seed: int = 42, sizes: Sizes | None = None
) -> dict[str, dict[str, float]]:
    """Run the quick start and print what it does.

    Args:
        output_dir: gets `data/`, `warmup/`, `contrastive/` and `recpo/` with their models,
            `results.json`, `training.png`, and `quickstart.json`, which lists the finished stages:
            a run that was stopped goes on after them.
        seed: of data, model and training: the same seed gives the same numbers on one machine.
        sizes: how much to train.

    Returns:
        Method -> test metrics (`ranking_metrics`).

    Raises:
        RunStopped: SIGTERM came.
        ValueError: `output_dir` holds a finished quick start, or one of other settings.
    """
    with sigterm_raises(
        "stopped by SIGTERM; the same command goes on from the last stage it finished"
    ):
        return _run(Path(output_dir), seed, sizes or Sizes())


def _run(output: Path, seed: int, sizes: Sizes) -> dict[str, dict[str, float]]:
    import torch

    started = time.perf_counter()
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    # one line a step is for long runs
    logging.getLogger("r2ec_fast").setLevel(logging.WARNING)
    say(NOTICE)
    progress = Progress(output, seed, sizes)
    dataset = world.generate(sizes, seed)
    data = dataset.data
    say(
        f"data: {data.num_users:,} users, {data.num_items:,} items, {data.num_events:,} events; "
        f"{len(dataset.train):,} / {len(dataset.valid):,} / {len(dataset.test):,} examples by time"
    )
    progress.finish("data")
    dataset.save(output / "data")
    rows = stages.baselines(dataset, sizes, seed)
    if "warm-up" not in progress:
        _warm_up(dataset, sizes, seed, output)
        progress.finish("warm-up")
    if "contrastive" not in progress:
        trainer = stages.contrastive_trainer(dataset, sizes, seed, output)
        first, last, seconds = _train(trainer, "contrastive", "loss")
        say(
            f"contrastive: {sizes.contrastive_steps} steps, loss {first:.2f} -> {last:.2f}, "
            f"{seconds:.0f} s"
        )
        progress.finish("contrastive", stages.evaluate(trainer, sizes, reasoning=False))
    rows["contrastive (direct)"] = progress["contrastive"]
    trainer = stages.recpo_trainer(dataset, sizes, seed, output)
    first, last, seconds = _train(trainer, "RecPO", "reward")
    say(
        f"RecPO: {sizes.recpo_steps} steps, mean reward of the first quarter {first:.3f}, "
        f"of the last {last:.3f}, {seconds:.0f} s"
    )
    rows["RecPO (direct)"] = stages.evaluate(trainer, sizes, reasoning=False)
    rows["RecPO (reasoned)"] = stages.evaluate(trainer, sizes, reasoning=True)
    _report(rows, output, dataset)
    progress.finish("report")
    say(f"total: {time.perf_counter() - started:.0f} s, written to {output}")
    return rows


def _warm_up(dataset: RecDataset, sizes: Sizes, seed: int, output: Path) -> None:
    """Make a model, warm it up, and leave it in `output/warmup`."""
    import torch

    torch.manual_seed(seed)
    model = world.new_model(dataset.data.catalog, sizes)
    say(f"model: Qwen2, {sum(p.numel() for p in model.parameters()):,} parameters, random weights")
    clock = time.perf_counter()
    losses = stages.warm_up(
        model, dataset, steps=sizes.warmup_steps, batch_size=sizes.batch, seed=seed
    )
    say(
        f"warm-up: {len(losses)} steps, token loss {losses[0][0]:.2f} -> {losses[-1][0]:.2f}, item "
        f"loss {losses[0][1]:.2f} -> {losses[-1][1]:.2f}, {time.perf_counter() - clock:.0f} s"
    )
    model.save_pretrained(output / "warmup")


def _train(trainer: RecPOTrainer, stage: str, shown: str) -> tuple[float, float, float]:
    """Train; returns the means of the logged values `shown` over the first and the last quarter of
    the run, and its seconds. Raises RunStopped where SIGTERM ended it before its time."""
    from r2ec_fast.report.plots import read_log

    clock = time.perf_counter()
    trainer.train()
    if trainer.stopped:
        raise RunStopped(
            f"{stage} stopped by SIGTERM after step {trainer.step} of {trainer.max_steps}; the "
            "same command goes on from there"
        )
    seconds = time.perf_counter() - clock
    records = read_log(trainer.config.output_dir)
    first, last = ends([record[shown] for record in records if shown in record])
    return first, last, seconds


def ends(values: list[float]) -> tuple[float, float]:
    """Means of the first and of the last quarter."""
    quarter = max(len(values) // 4, 1)
    return float(np.mean(values[:quarter])), float(np.mean(values[-quarter:]))


def _report(rows: dict[str, dict[str, float]], output: Path, dataset: RecDataset) -> None:
    from r2ec_fast.eval.metrics import metrics_table
    from r2ec_fast.report.plots import plot_runs
    from r2ec_fast.serve.display import show_recommendations
    from r2ec_fast.serve.recommender import Recommender

    say(f"\n{metrics_table(rows)}")
    (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    runs = {name: output / name for name in ("contrastive", "recpo")}
    plot_runs(runs, output / "training.png", note="generated data")
    recommender = Recommender.from_pretrained(output / "recpo" / "model", data=dataset)
    users = dataset.data.users.decode(dataset.test.user[:SHOWN_USERS])
    results = recommender.recommend(users, k=5, max_completion_length=24)
    for user, result in zip(users, results, strict=True):
        show_recommendations(f"user {user}", result)

"""The quick start: a recommender that reasons, trained from nothing on generated data.

In the generated world (`world`) a purchase follows from a chain of look-ups that counting and a
single pass do not find. A small model learns the language of the world (`warmup`), but not which
chain predicts purchases; RecPO finds that out from the purchases alone. Everything runs offline on
one core. Its numbers say nothing about real data.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from r2ec_fast.quickstart import stages
from r2ec_fast.quickstart.progress import Progress, StepLines
from r2ec_fast.quickstart.stages import Sizes
from r2ec_fast.utils.signals import RunStopped, sigterm_raises
from r2ec_fast.utils.terminal import say

if TYPE_CHECKING:
    from r2ec_fast.data import RecDataset
    from r2ec_fast.quickstart.world import World
    from r2ec_fast.train.trainer import RecPOTrainer

NOTICE = (
    "Everything below is GENERATED data: made-up items, and users whose next purchase follows from "
    "a rule\nthat rewards reasoning. It shows that the method works where reasoning must pay; the "
    "numbers say nothing\nabout real data."
)
BEFORE, AFTER = "reasoned, before RecPO", "reasoned, after RecPO"


def run(
    output_dir: str | Path = "runs/quickstart", *, seed: int = 42, sizes: Sizes | None = None
) -> dict[str, dict[str, float]]:
    """Run the quick start and print what it does.

    Args:
        output_dir: gets `data/`, `warmup/`, `direct/` and `recpo/` with their models,
            `results.json`, `training.png`, and `quickstart.json`, which lists the finished stages:
            a run that was stopped goes on after them.
        seed: of data, model and training: the same seed gives the same numbers on one machine.
        sizes: how much to train.

    Returns:
        Method -> test metrics (`ranking_metrics`); the last row is the best possible.

    Raises:
        RunStopped: SIGTERM came.
        ValueError: `output_dir` holds a finished quick start, or one of other settings.
    """
    message = "stopped by SIGTERM; the same command goes on from the last stage it finished"
    with sigterm_raises(message), _one_thread(), _quiet():
        return _run(Path(output_dir), seed, sizes or Sizes())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread. The products of so small a model gain little from a second one, and
    threads that wait for one that the system took from its core cost much more than that."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a log line a step, and without transformers' bars for reading and writing files."""
    from transformers.utils import logging as transformers_logging

    own = logging.getLogger("r2ec_fast")
    level, bars = own.level, transformers_logging.is_progress_bar_enabled()
    own.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        own.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _run(output: Path, seed: int, sizes: Sizes) -> dict[str, dict[str, float]]:
    started = time.perf_counter()
    say(NOTICE)
    progress = Progress(output, seed, sizes)
    world = replace(sizes.world, seed=seed)
    dataset = world.dataset()
    data = dataset.data
    say(
        f"data: {data.num_users:,} users, {data.num_items:,} items, {data.num_events:,} events; "
        f"{len(dataset.train):,} / {len(dataset.valid):,} / {len(dataset.test):,} examples by time"
    )
    progress.finish("data")
    dataset.save(output / "data")
    examples = stages.examples_of(dataset, sizes, seed)
    rows = stages.baselines(dataset, examples)
    if "warm-up" not in progress:
        progress.finish("warm-up", _warm_up(world, dataset, sizes, seed, output))
    if "direct" not in progress:
        lines = StepLines("direct", sizes.direct_steps, ("loss",))
        trainer = stages.direct_trainer(dataset, sizes, seed, output, lines)
        first, last, seconds = _train(trainer, "direct", "loss")
        say(
            f"direct: {sizes.direct_steps} contrastive steps of the whole model, loss {first:.2f} "
            f"-> {last:.2f}, {seconds:.0f} s"
        )
        metrics = stages.evaluate(trainer.model, dataset, examples, reasoning=False)
        progress.finish("direct", metrics)
    rows["direct, trained"] = progress["direct"]
    rows[BEFORE] = progress["warm-up"]
    lines = StepLines("RecPO", sizes.recpo_steps, ("reward", "completions/mean_length"))
    trainer = stages.recpo_trainer(world, dataset, sizes, seed, output, lines)
    first, last, seconds = _train(trainer, "RecPO", "reward")
    say(
        f"RecPO: {sizes.recpo_steps} steps of adapters, mean reward of the first quarter "
        f"{first:.3f}, of the last {last:.3f}, {seconds:.0f} s"
    )
    rows[AFTER] = stages.evaluate(trainer.model, dataset, examples, reasoning=True)
    rows["best possible"] = world.best_possible(dataset, examples)
    _report(rows, output, world, dataset)
    progress.finish("report")
    say(f"total: {time.perf_counter() - started:.0f} s, written to {output}")
    return rows


def _warm_up(
    world: World, dataset: RecDataset, sizes: Sizes, seed: int, output: Path
) -> dict[str, float]:
    """Make a model, warm it up and leave it in `output/warmup`; returns its test metrics."""
    lines = StepLines("warm-up", sizes.warmup_steps, ("token loss",))
    clock = time.perf_counter()
    model, losses = stages.warm_up(
        world, dataset, sizes, lambda step, loss: lines({"step": step, "token loss": loss.token})
    )
    say(
        f"warm-up: {len(losses)} steps of a model with "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, token loss "
        f"{losses[0].token:.2f} -> {losses[-1].token:.2f}, {time.perf_counter() - clock:.0f} s"
    )
    examples = stages.examples_of(dataset, sizes, seed)
    metrics = stages.evaluate(model, dataset, examples, reasoning=True)
    model.save_pretrained(output / "warmup", dataset.data.catalog)
    return metrics


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


def _report(
    rows: dict[str, dict[str, float]], output: Path, world: World, dataset: RecDataset
) -> None:
    from r2ec_fast.eval.metrics import metrics_table
    from r2ec_fast.quickstart.picture import draw

    say(f"\n{metrics_table(rows)}")
    (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw(output / "recpo", output / "training.png", steps=world.steps)
    _show_user(output, world, dataset)


def _show_user(output: Path, world: World, dataset: RecDataset) -> None:
    """Print what the model writes about the first test example before and after RecPO."""
    from r2ec_fast.quickstart.reasoning import judge_reasoning, write_chain
    from r2ec_fast.serve.recommender import Recommender

    example = dataset.test[:1]
    history = dataset.history(int(example.user[0]), int(example.position[0]))
    titles = dataset.data.catalog.titles
    shown = [titles[item] for item in history.items[-world.steps :]]
    say(f"\nuser {dataset.data.users.decode(example.user)[0]} bought {', '.join(shown)}")
    say(f"  the rule:     {write_chain(world.chain(history.items))}")
    say(f"  bought next:  {titles[int(dataset.target(example)[0])]}")
    for name, directory in (("before RecPO", "warmup"), ("after RecPO", "recpo/model")):
        recommender = Recommender.from_pretrained(output / directory)
        limit = stages.MAX_COMPLETION_LENGTH
        (best,) = recommender.recommend([history], 5, max_completion_length=limit)
        right = judge_reasoning(world, best.reasoning or "", history.items).right
        say(f"  {name + ':':13} {best.reasoning}{'' if right else ' (not the right chain)'}")
        say(f"  {'':13} recommends {', '.join(item.title for item in best)}")
    say("")

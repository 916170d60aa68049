"""Curves of training runs, from the metrics.jsonl that each writes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from r2ec_fast.eval.metrics import BEST_METRIC
from r2ec_fast.train.logger import METRICS_FILE

SMOOTH = 8  # steps of the running mean

log = logging.getLogger(__name__)


def read_log(run_dir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The records of a run's metrics.jsonl, in the order they were written.

    A line that is no record, as the last one after a full disk or a killed run, is left out with a
    warning.
    """
    return read_json_lines(Path(run_dir) / METRICS_FILE)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log, one a line; see `read_log`."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "step" in record:
            records.append(record)
        else:
            log.warning(f"{path}: line {number} is cut or broken; it is left out")
    return records


def plot_runs(
    runs: Mapping[str, str | os.PathLike[str]], path: str | os.PathLike[str], *, note: str = ""
) -> None:
    """Write a PNG: the mean reward of every RecPO step, and validation ndcg@10, of named runs.

    Args:
        runs: name of the run -> its output directory.
        path: the picture.
        note: what the data is, shown in the titles.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, directory in runs.items():
        records = read_log(directory)
        reward = np.array([r["reward"] for r in records if "reward" in r])
        if len(reward):
            steps = np.arange(1, len(reward) + 1)
            (line,) = left.plot(steps, reward, alpha=0.35)
            mean = [reward[max(0, i + 1 - SMOOTH) : i + 1].mean() for i in range(len(reward))]
            left.plot(steps, mean, color=line.get_color(), label=f"{name}, mean of {SMOOTH} steps")
        valid = [(r["step"], r[BEST_METRIC]) for r in records if BEST_METRIC in r]
        if valid:
            right.plot(*zip(*valid, strict=True), marker="o", label=name)
    suffix = f" ({note})" if note else ""
    left.set(xlabel="RecPO step", ylabel="mean reward", title=f"Reward{suffix}")
    right.set(xlabel="step", ylabel="ndcg@10", title=f"Validation{suffix}", ylim=(0, None))
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=120, format="png")

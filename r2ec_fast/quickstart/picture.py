"""The picture of a quick start: what RecPO did to reward, reasonings and their length."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from r2ec_fast.quickstart.judging import read_judgements

SMOOTH = 5  # steps of the running mean


def draw(recpo_dir: Path, path: Path, *, steps: int) -> None:
    """Write a PNG with three curves over the RecPO steps of a run: mean reward, share of right
    reasonings, mean length in steps; ``steps`` is the length of the right chain."""
    from matplotlib.figure import Figure

    from r2ec_fast.report.plots import read_log

    judged = read_judgements(recpo_dir)
    rewards = [record["reward"] for record in read_log(recpo_dir) if "reward" in record]
    curves = {
        "mean reward": rewards,
        "share of right reasonings": [record["right"] for record in judged],
        "steps in a reasoning": [record["steps"] for record in judged],
    }
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        (line,) = axes.plot(range(1, len(values) + 1), values, alpha=0.35)
        mean = [np.mean(values[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(values))]
        axes.plot(
            range(1, len(values) + 1), mean, color=line.get_color(), label=f"mean of {SMOOTH}"
        )
        axes.set(xlabel="RecPO step", title=name, ylim=(0, None))
    axes.axhline(steps, color="grey", linestyle=":", label="the rule's chain")
    axes.legend(loc="lower right")
    figure.suptitle("Quick start, generated data: what RecPO learns from purchases alone")
    figure.savefig(path, dpi=120, format="png")

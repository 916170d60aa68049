"""Files of `reasoning.py`: a run's figures in JSON, and the table and the picture of all seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from reasoning_runs import Figures, every_run
from scipy import stats

from r2ec_fast.utils.atomic_files import replaced_file, write_whole

METRIC = "ndcg@10"
SETTINGS, RESULTS, TABLE, PICTURE = "settings.json", "results.json", "table.md", "reasoning.png"
CURVES = {"reward": "mean reward", "length": "tokens of a reasoning", "right": "right reasonings"}
PARTS = 5
SMOOTH = 5  # steps of the running mean in the picture

Seeds = Mapping[int, Mapping[str, Figures]]


class Store:
    """The finished runs in a directory: ``seed-N/RUN.json``, and ``settings.json``.

    Processes may share it, each with seeds of its own: a file appears whole, by renaming.

    Raises ValueError, naming the setting, where the directory holds runs of other ``settings``.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        path = directory / SETTINGS
        wanted = json.loads(json.dumps(settings))  # as a file gives it back
        if path.is_file():
            found = json.loads(path.read_text())
            for name in wanted:
                if found.get(name) != wanted[name]:
                    raise ValueError(
                        f"output_dir: {directory} holds runs with {name} {found.get(name)!r}, this "
                        f"one has {wanted[name]!r}; choose another output_dir"
                    )
            return
        write_whole(path, json.dumps(wanted, indent=1) + "\n", "output_dir")

    def folder(self, seed: int) -> Path:
        return self.directory / f"seed-{seed}"

    def finished(self, seed: int) -> dict[str, Figures]:
        """The runs of a seed that are done, in the order of the table."""
        paths = {name: self.folder(seed) / f"{name}.json" for name in every_run()}
        return {
            name: Figures(**json.loads(path.read_text()))
            for name, path in paths.items()
            if path.is_file()
        }

    def add(self, seed: int, name: str, figures: Figures) -> None:
        text = json.dumps(asdict(figures), indent=1)
        write_whole(self.folder(seed) / f"{name}.json", text + "\n", "output_dir")

    def every(self) -> dict[int, dict[str, Figures]]:
        """Of all seeds in the directory."""
        seeds = sorted(int(path.name.removeprefix("seed-")) for path in self._folders())
        return {seed: self.finished(seed) for seed in seeds if self.finished(seed)}

    def _folders(self) -> list[Path]:
        return [path for path in self.directory.glob("seed-*") if path.name[5:].isdigit()]

    def report(self, header: Sequence[str]) -> str:
        """Write results, table and picture of all seeds; returns the table."""
        seeds = self.every()
        plain = {
            seed: {name: asdict(figures) for name, figures in runs.items()}
            for seed, runs in seeds.items()
        }
        settings = json.loads((self.directory / SETTINGS).read_text())
        results = json.dumps({"settings": settings, "seeds": plain}, indent=1)
        write_whole(self.directory / RESULTS, results + "\n", "output_dir")
        text = "\n".join([*header, "", metrics_table(seeds), "", curves_table(seeds), ""])
        write_whole(self.directory / TABLE, text, "output_dir")
        draw(seeds, self.directory / PICTURE)
        return text


def mean_and_band(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval by Student's t; NaN for one value."""
    count = len(values)
    if count < 2:
        return float(np.mean(values)), math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return float(np.mean(values)), float(stats.t.ppf(0.975, count - 1)) * error


def rows_of(seeds: Seeds, metric: str = METRIC) -> dict[str, list[float]]:
    """Row of the table -> its value in each seed that has it, in the order of the runs."""
    found: dict[str, list[float]] = {}
    for name in every_run():
        for runs in seeds.values():
            for row, metrics in runs[name].rows.items() if name in runs else ():
                found.setdefault(row, []).append(metrics[metric])
    return found


def metrics_table(seeds: Seeds) -> str:
    """ndcg@10 of every row, mean and 95% band over seeds, in Markdown."""
    seconds: dict[str, list[float]] = {}
    for figures in (figures for runs in seeds.values() for figures in runs.values()):
        for row, took in figures.seconds.items():
            seconds.setdefault(row, []).append(took)
    lines = [f"| | {METRIC} | 95% band | seeds | training, CPU s |", "|---|---:|---:|---:|---:|"]
    for row, values in rows_of(seeds).items():
        mean, band = mean_and_band(values)
        took = f"{np.median(seconds[row]):.0f}" if row in seconds else ""
        lines.append(f"| {row} | {mean:.3f} | {_band(band)} | {len(values)} | {took} |")
    return "\n".join(lines)


def curves_table(seeds: Seeds) -> str:
    """Reward, length and share of right reasonings by fifths of the RecPO steps, means over seeds,
    in Markdown."""
    lines = [f"| by fifths of the steps | {' | '.join(CURVES.values())} |", "|---|---|---|---|"]
    for name, found in curves_of(seeds).items():
        cells = []
        for curve in CURVES:
            parts = np.array_split(found[curve].mean(0), PARTS)
            digits = 1 if curve == "length" else 2
            cells.append(" ".join(f"{part.mean():.{digits}f}" for part in parts if len(part)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves_of(seeds: Seeds) -> dict[str, dict[str, np.ndarray]]:
    """Run -> curve -> [seeds, steps]."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in every_run():
        curves = [runs[name].curves for runs in seeds.values() if name in runs]
        known = [curve for curve in curves if curve is not None]
        if known:
            found[name] = {key: np.array([curve[key] for curve in known]) for key in CURVES}
    return found


def draw(seeds: Seeds, path: Path) -> None:
    """Write a PNG: every row's mean and band beside each other, and the reward by RecPO step."""
    from matplotlib.figure import Figure

    rows = rows_of(seeds)
    figure = Figure(figsize=(13, 1.5 + 0.3 * max(len(rows), 10)), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(len(rows))
    bands = [mean_and_band(values) for values in rows.values()]
    left.errorbar(
        [mean for mean, _ in bands],
        places,
        xerr=[0.0 if math.isnan(band) else band for _, band in bands],
        fmt="o",
        ms=5,
        capsize=3,
    )
    left.set_yticks(places, list(rows))
    left.invert_yaxis()
    left.set(xlim=(0, None), xlabel=f"{METRIC}, mean and 95% band of {len(seeds)} seeds")
    left.grid(alpha=0.3)
    for name, found in curves_of(seeds).items():
        steps = np.arange(1, found["reward"].shape[1] + 1)
        smooth = np.array([_running_mean(reward) for reward in found["reward"]])
        (line,) = right.plot(steps, smooth.mean(0), label=name)
        if len(smooth) > 1:
            low, high = smooth.min(0), smooth.max(0)
            right.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
    right.set(
        xlabel="RecPO step", ylabel=f"reward, mean of {SMOOTH} steps; least to most", ylim=(0, None)
    )
    right.grid(alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        right.legend()
    figure.suptitle("Generated world: does reasoning pay, and what takes it away")
    with replaced_file(path, "output_dir") as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _running_mean(values: np.ndarray) -> list[float]:
    return [float(values[max(0, i + 1 - SMOOTH) : i + 1].mean()) for i in range(len(values))]


def _band(half: float) -> str:
    return "" if math.isnan(half) else f"±{half:.3f}"

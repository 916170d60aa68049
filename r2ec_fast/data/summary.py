"""What a dataset looks like: a text report and a picture of its histograms."""

from __future__ import annotations

import datetime as dt
import io
from typing import TYPE_CHECKING

import numpy as np

from r2ec_fast.data.dataset import RecDataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


def history_lengths(dataset: RecDataset) -> np.ndarray:
    """[U] events of each user."""
    return np.diff(dataset.data.offsets)


def title_words(dataset: RecDataset) -> np.ndarray:
    """[N] words of each title."""
    return np.array([len(title.split()) for title in dataset.data.catalog.titles], dtype=np.int64)


def summary_text(dataset: RecDataset) -> str:
    """Sizes, density, time span, quantiles of lengths, the load report: plain text."""
    data = dataset.data
    cells = data.num_users * data.num_items
    repeat = data.num_events - _distinct_pairs(dataset)
    with_example = int((history_lengths(dataset) > 1).sum())
    lines = [
        f"users         {data.num_users:>12,}  ({with_example:,} with an example)",
        f"items         {data.num_items:>12,}",
        f"interactions  {data.num_events:>12,}  ({repeat:,} of them repeats)",
        f"density       {data.num_events / cells if cells else 0.0:>12.3e}",
        f"examples      {len(dataset.train):,} train, {len(dataset.valid):,} valid, "
        f"{len(dataset.test):,} test",
    ]
    if data.timestamp is not None and data.num_events:
        lines.append(f"time          {_day(data.timestamp.min())} to {_day(data.timestamp.max())}")
    for name, part in (("train", dataset.train), ("valid", dataset.valid), ("test", dataset.test)):
        times = dataset.target_time(part)
        if times is not None and len(part):
            lines.append(f"  {name:<11} {_day(times.min())} to {_day(times.max())}")
    lines.append("")
    lines.append(f"{'':24}{'min':>8}{'25%':>8}{'50%':>8}{'75%':>8}{'95%':>8}{'max':>8}{'mean':>9}")
    rows = [
        ("events of a user", history_lengths(dataset)),
        ("words of a title", title_words(dataset)),
    ]
    if len(dataset.test):
        rows.append(("events before a test", dataset.test.position))
    lines += [_quantiles(name, values) for name, values in rows]
    return "\n".join([*lines, "", data.report.to_text()])


def summary_png(dataset: RecDataset) -> bytes:
    """Histograms of history length, title length and time as a PNG; the same bytes every time."""
    from matplotlib.figure import Figure

    panels = 3 if dataset.data.timestamp is not None else 2
    figure = Figure(figsize=(4.2 * panels, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, panels)
    lengths = history_lengths(dataset)
    limit = int(max(np.quantile(lengths, 0.99), 10)) if len(lengths) else 10
    axes[0].hist(np.minimum(lengths, limit), bins=np.arange(0.5, limit + 1.5))
    axes[0].set(
        xlabel=f"events of a user (last bar: {limit} or more)", ylabel="users", yscale="log"
    )
    words = title_words(dataset)
    most = int(words.max()) if len(words) else 1
    axes[1].hist(words, bins=np.arange(0.5, most + 1.5))
    axes[1].set(xlabel="words of a title", ylabel="items")
    if panels == 3:
        _draw_times(axes[2], dataset)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _draw_times(axes: Axes, dataset: RecDataset) -> None:
    parts = {"train": dataset.train, "valid": dataset.valid, "test": dataset.test}
    times = {name: dataset.target_time(part) for name, part in parts.items() if len(part)}
    days = {name: time / 86_400 for name, time in times.items() if time is not None}
    if days:
        first, last = min(d.min() for d in days.values()), max(d.max() for d in days.values())
        edges = np.linspace(first, last + 1, 60).tolist()
        axes.hist(list(days.values()), bins=edges, stacked=True, label=list(days))
        axes.xaxis_date()
        axes.tick_params(axis="x", rotation=30)
        axes.legend()
    axes.set(xlabel="time of the target", ylabel="examples")


def _distinct_pairs(dataset: RecDataset) -> int:
    data = dataset.data
    user = np.repeat(np.arange(data.num_users), history_lengths(dataset))
    return len(np.unique(user * max(data.num_items, 1) + data.item))


def _quantiles(name: str, values: np.ndarray) -> str:
    if not len(values):
        return f"{name:<24}       -"
    cells = "".join(f"{np.quantile(values, q):>8.0f}" for q in QUANTILES)
    return f"{name:<24}{cells}{values.mean():>9.2f}"


def _day(second: int) -> str:
    return dt.datetime.fromtimestamp(int(second), dt.UTC).date().isoformat()

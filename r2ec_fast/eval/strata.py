"""Accuracy by kind of example: length of the history, popularity of the target, cold targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from r2ec_fast.eval.beyond_accuracy import ItemCounts
from r2ec_fast.eval.metrics import metric_cell, ranking_metrics

if TYPE_CHECKING:
    from r2ec_fast.data import Examples, RecDataset

HISTORY_LENGTHS = (1, 5, 20)  # where the strata of history lengths begin
HEAD_SHARE = 0.2  # of the items with training events: the popular ones
COLD = "cold target"


def strata(dataset: RecDataset, examples: Examples, counts: ItemCounts) -> dict[str, np.ndarray]:
    """Which examples belong to each stratum: name -> bool [X].

    History: the number of the user's events before the example. Target: "head" are the most popular
    fifth of the items that have training events (equal counts: lower id first), "tail" the other
    ones, and a cold target has none: no method that only knows ids can rank it by anything.
    """
    out = {}
    for first, following in pairwise((*HISTORY_LENGTHS, None)):
        inside = examples.position >= first
        if following is not None:
            inside &= examples.position < following
        end = "+" if following is None else f"-{following - 1}"
        out[f"history {first}{end}"] = inside
    target = dataset.target(examples)
    warm = counts.events > 0
    order = np.lexsort((np.arange(len(warm)), -counts.events))
    head = np.zeros(len(warm), dtype=bool)
    head[order[: math.ceil(HEAD_SHARE * warm.sum())]] = True
    out["target in the head"] = head[target]
    out["target in the tail"] = warm[target] & ~head[target]
    out[COLD] = ~warm[target]
    return out


def stratified_metrics(
    ranks: ArrayLike, masks: Mapping[str, np.ndarray], *, users: ArrayLike | None = None
) -> dict[str, float]:
    """`ranking_metrics` of each stratum, its name and a slash before every key; of a stratum
    without examples only `{name}/examples` = 0."""
    ranks = np.asarray(ranks)
    users = None if users is None else np.asarray(users)
    out: dict[str, float] = {}
    for name, mask in masks.items():
        if not mask.any():
            out[f"{name}/examples"] = 0.0
            continue
        own = None if users is None else users[mask]
        out |= ranking_metrics(ranks[mask], users=own, prefix=f"{name}/")
    return out


def strata_table(rows: Mapping[str, Mapping[str, float]], metric: str = "ndcg@10") -> str:
    """A Markdown table, one row a stratum, one column a method, `mean ± standard error` a cell.

    Args:
        rows: name of the method -> `ranking_metrics` and `stratified_metrics` of it.
        metric: the metric shown.
    """
    if not rows:
        raise ValueError("rows must hold at least one method")
    first = next(iter(rows.values()))
    names = [key.removesuffix("/examples") for key in first if key.endswith("/examples")]
    lines = [
        f"| {metric} | examples | " + " | ".join(rows) + " |",
        "|---|" + "---:|" * (len(rows) + 1),
    ]
    for name in ("all", *names):
        prefix = "" if name == "all" else f"{name}/"
        cells = [metric_cell(found, f"{prefix}{metric}") for found in rows.values()]
        lines.append(f"| {name} | {first[f'{prefix}examples']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

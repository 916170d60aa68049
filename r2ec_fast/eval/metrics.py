"""Ranks of the targets -> hit_rate@k, ndcg@k, mrr@k (one target an example)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

METRICS = ("hit_rate", "ndcg", "mrr")
STDERR = "/se"
BEST_METRIC = "eval_valid_ndcg@10"  # what validation keeps the best checkpoint by


def ranking_metrics(
    ranks: ArrayLike,
    ks: Sequence[int] = (5, 10, 20),
    *,
    users: ArrayLike | None = None,
    prefix: str = "",
) -> dict[str, float]:
    """Means over examples, and their standard errors, from the rank of each example's single
    target.

    With r the rank: hit_rate@k = [r <= k], ndcg@k = [r <= k] / log2(r + 1), mrr@k = [r <= k] / r.

    Args:
        ranks: [X] integers >= 1 (1 = best), an array, a CPU tensor or a sequence.
        ks: cut-offs.
        users: [X], whose example each is, in any type. A user's examples are alike, so the
            standard errors then count users as independent, not examples (clustered by user).
        prefix: written before every key, e.g. "eval_valid_" for `eval_valid_ndcg@10`.

    Returns:
        `{prefix}{metric}@{k}`, its standard error `{prefix}{metric}@{k}/se` (NaN for one user, or
        one example without `users`), and `{prefix}examples` = X.

    Raises:
        ValueError: `ranks` is empty, not one-dimensional, not integer or below 1, `users` has
            another shape, or a cut-off is below 1.
    """
    ranks = _checked("ranks", ranks)
    return means_with_errors(_gains(ranks, ks), len(ranks), users, prefix)


def paired_differences(
    ranks: ArrayLike,
    other: ArrayLike,
    ks: Sequence[int] = (5, 10, 20),
    *,
    users: ArrayLike | None = None,
) -> dict[str, float]:
    """How much better one method ranks the targets than another does on the same examples.

    The keys of `ranking_metrics`; a mean is that of the examples' own differences (first minus
    second), so that what makes an example hard for both does not widen its standard error.

    Args:
        ranks: [X] of one method, as `ranking_metrics` takes them.
        other: [X] of another, example by example.
        ks: cut-offs.
        users: [X], as `ranking_metrics` takes them.

    Raises:
        ValueError: as `ranking_metrics`, or where the two have different lengths.
    """
    ranks, other = _checked("ranks", ranks), _checked("other", other)
    if len(ranks) != len(other):
        raise ValueError(f"other must have shape [{len(ranks)}] like ranks, got [{len(other)}]")
    gains, others = _gains(ranks, ks), _gains(other, ks)
    return means_with_errors({key: gains[key] - others[key] for key in gains}, len(ranks), users)


def _checked(name: str, ranks: ArrayLike) -> np.ndarray:
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or ranks.size == 0:
        raise ValueError(f"{name} must have shape [X] with X >= 1, got shape {list(ranks.shape)}")
    if not np.issubdtype(ranks.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {ranks.dtype}")
    if ranks.min() < 1:
        raise ValueError(f"{name} start at 1, got {ranks.min()}")
    return ranks


def _gains(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """What every example contributes to each metric, float64 [X]."""
    out: dict[str, np.ndarray] = {}
    for k in ks:
        if k < 1:
            raise ValueError(f"ks must be at least 1, got {k}")
        hit = ranks <= k
        gains = (hit.astype(np.float64), hit / np.log2(ranks + 1.0), hit / ranks)
        out |= {f"{name}@{k}": gain for name, gain in zip(METRICS, gains, strict=True)}
    return out


def means_with_errors(
    values: Mapping[str, np.ndarray],
    examples: int,
    users: ArrayLike | None = None,
    prefix: str = "",
) -> dict[str, float]:
    """Mean of each named quantity [X] over the X = `examples` examples, and its standard error.

    Keys as `ranking_metrics` gives them: `{prefix}{name}`, `{prefix}{name}/se`, `{prefix}examples`.
    With `users` [X] only users are independent. Raises ValueError where `users` has another shape.
    """
    cluster = np.arange(examples)
    if users is not None:
        users = np.asarray(users)
        if users.shape != (examples,):
            raise ValueError(f"users must have shape [{examples}], got {list(users.shape)}")
        cluster = np.unique(users, return_inverse=True)[1]
    out = {}
    for key, value in values.items():
        out[f"{prefix}{key}"] = float(value.mean())
        out[f"{prefix}{key}{STDERR}"] = _standard_error(value, cluster)
    out[f"{prefix}examples"] = float(examples)
    return out


def _standard_error(values: np.ndarray, cluster: np.ndarray) -> float:
    """Of the mean of `values` [X] where only the clusters (numbers from 0) are independent.

    The sandwich estimator of Liang and Zeger (1986) for a mean, with the factor C / (C - 1); where
    every value is a cluster of its own it is the sample standard deviation / sqrt(X).
    """
    sums = np.bincount(cluster, weights=values - values.mean())
    if len(sums) == 1:
        return math.nan
    return math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(values)


def metrics_table(
    rows: Mapping[str, Mapping[str, float]],
    columns: Sequence[str] = ("hit_rate@5", "ndcg@5", "hit_rate@10", "ndcg@10", "mrr@10"),
    *,
    differences: bool = False,
) -> str:
    """A Markdown table, one row a method, `mean ± standard error` a cell (a column that a row lacks
    is a dash).

    Args:
        rows: name of the method -> its metrics, as `ranking_metrics` without prefix returns them.
        columns: metrics shown.
        differences: the rows are `paired_differences`; their means get a sign.
    """
    if not rows:
        raise ValueError("rows must hold at least one method")
    lines = [
        f"| {'paired difference' if differences else 'method'} | "
        + " | ".join(columns)
        + " | examples |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for name, metrics in rows.items():
        cells = [metric_cell(metrics, column, "+" if differences else "") for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {metrics['examples']:.0f} |")
    return "\n".join(lines)


def metric_cell(metrics: Mapping[str, float], column: str, sign: str = "") -> str:
    """`mean ± standard error` of one metric, a dash where it is missing; `sign` "+" shows one."""
    if column not in metrics:
        return "–"
    error = metrics.get(f"{column}{STDERR}", math.nan)
    return f"{metrics[column]:{sign}.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")

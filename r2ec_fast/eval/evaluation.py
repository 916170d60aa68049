"""Several methods on the same examples: their ranks and lists, and what is told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from r2ec_fast.eval.baseline_choice import fits_table
from r2ec_fast.eval.beyond_accuracy import (
    COLUMNS,
    LIST_LENGTH,
    ItemCounts,
    beyond_accuracy,
    text_vectors,
)
from r2ec_fast.eval.comparison import ranks_table
from r2ec_fast.eval.metrics import metrics_table, ranking_metrics
from r2ec_fast.eval.ranking import TopItems, rank_examples
from r2ec_fast.eval.strata import strata, strata_table, stratified_metrics

if TYPE_CHECKING:
    import polars as pl

    from r2ec_fast.data import Examples, RecDataset
    from r2ec_fast.eval.baselines import Baseline
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.prompts.segments import PromptAssembler


class Evaluation:
    """Ranks of the examples' targets by every method that is added, in that order.

    Args:
        dataset: catalog and training events.
        examples: whose targets are ranked.
        beyond_accuracy: also keep each method's ten best items, and tell of them and of strata.
        include: bool [N], the only items that compete with a target and are recommended; None:
            all.

    Attributes:
        fitted: baseline -> its `fit_seconds`, `fit_cpu_seconds` and `settings`.
    """

    def __init__(
        self,
        dataset: RecDataset,
        examples: Examples,
        beyond_accuracy: bool,
        include: np.ndarray | None = None,
    ) -> None:
        self.dataset, self.examples, self.include = dataset, examples, include
        self.fitted: dict[str, dict[str, Any]] = {}
        self._ranks: dict[str, np.ndarray] = {}
        self._lists: dict[str, np.ndarray] | None = {} if beyond_accuracy else None

    def add_baseline(self, baseline: Baseline, window: int | None) -> None:
        """Add a fitted baseline; `window` as it takes it."""
        name = baseline.name
        self.fitted[name] = {
            "fit_seconds": baseline.fit_seconds,
            "fit_cpu_seconds": baseline.fit_cpu_seconds,
            "settings": baseline.settings,
        }
        limits: dict[str, Any] = {"window": window, "include": self.include}
        self._ranks[name] = baseline.ranks(self.examples, **limits)
        if self._lists is not None:
            self._lists[name] = baseline.top_items(self.examples, LIST_LENGTH, **limits)

    def add_model(
        self, name: str, model: R2ecModel, assembler: PromptAssembler, **settings: Any
    ) -> None:
        """Add a model; `settings` are those of `rank_examples`."""
        top = None if self._lists is None else TopItems(model, LIST_LENGTH, self.include)
        settings["include"] = self.include
        self._ranks[name], _ = rank_examples(
            model, assembler, self.dataset, self.examples, on_states=top, **settings
        )
        if self._lists is not None and top is not None:
            self._lists[name] = top.lists

    def ranks(self) -> pl.DataFrame:
        """The `ranks_table` of all methods."""
        return ranks_table(self.dataset, self.examples, self._ranks)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Method -> its metrics; beyond accuracy and by stratum too where that is asked for."""
        users = self.examples.user
        out = {name: ranking_metrics(ranks, users=users) for name, ranks in self._ranks.items()}
        if self._lists is not None:
            counts = ItemCounts.of(self.dataset)
            vectors = text_vectors(self.dataset.data.catalog.titles)
            masks = strata(self.dataset, self.examples, counts)
            for name, lists in self._lists.items():
                out[name] |= beyond_accuracy(lists, counts, vectors, users=users)
                out[name] |= stratified_metrics(self._ranks[name], masks, users=users)
        return out

    def tables(self, metrics: dict[str, dict[str, float]]) -> str:
        """What `metrics` gave, and the baselines' settings, as Markdown tables."""
        parts = [metrics_table(metrics)]
        if self._lists is not None:
            parts += [metrics_table(metrics, COLUMNS), strata_table(metrics)]
        if self.fitted:
            parts.append(fits_table(self.fitted))
        return "\n\n".join(parts)

"""Evaluations of a run, by all its processes, and what its reasonings are worth."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from r2ec_fast.data.splits import sample_examples
from r2ec_fast.eval.metrics import ranking_metrics
from r2ec_fast.eval.ranking import rank_examples
from r2ec_fast.eval.readiness import advice, concerns, summary
from r2ec_fast.eval.reasoning import (
    Groups,
    ReasoningProbe,
    ReasoningRanks,
    other_users,
    paired_ndcg,
)
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.train import distributed
from r2ec_fast.train.fault_tolerance import TokenBudget, together
from r2ec_fast.train.fsdp import gathered
from r2ec_fast.utils.random_state import random_state, restore_random_state

if TYPE_CHECKING:
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.data import Examples, RecDataset
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.prompts.segments import PromptAssembler
    from r2ec_fast.rollout import RolloutEngine
    from r2ec_fast.train.logger import RunLog

log = logging.getLogger(__name__)


class Validation:
    """Ranks examples of a run's data with its model and the item table as it stands.

    Every process takes a part of the examples, and all get the figures of the whole. Nothing here
    moves the run's random generators: its training is the same with and without it.
    """

    def __init__(
        self,
        model: R2ecModel,
        assembler: PromptAssembler,
        data: RecDataset,
        config: RecPOConfig,
        engine: RolloutEngine,
        budget: TokenBudget,
    ) -> None:
        self.model, self.assembler, self.data = model, assembler, data
        self.config, self.engine, self.budget = config, engine, budget

    def metrics(self, split: str, *, reasoning: bool, samples: int) -> dict[str, float]:
        """``eval_{split}_ndcg@10`` and so on; with reasoning and ``eval_direct`` also
        ``eval_{split}_reasoned_minus_direct_ndcg@10``. ``samples`` 0: the whole split."""
        examples = sample_examples(self.data, split, samples, self.config.seed)
        _, own = _own_part(examples)
        with self._local("evaluation"):
            found = [self._ranks(own, self.engine if reasoning else None)]
            if reasoning and self.config.eval_direct:
                found.append(self._ranks(own, None))
        every = distributed.gather_objects(found)
        ranks, *direct = (np.concatenate(parts) for parts in zip(*every, strict=True))
        out = ranking_metrics(ranks, users=examples.user, prefix=f"eval_{split}_")
        if direct:
            name = f"eval_{split}_reasoned_minus_direct"
            out |= paired_ndcg(name, ranks, direct[0], examples.user)
        return out

    def groups(self) -> dict[str, float]:
        """``groups/best_beats_direct`` of the diagnostic sample; empty where there is none."""
        if not self._diagnoses():
            return {}
        keys, own = _own_part(self._sample())
        with self._undisturbed(), self._local("groups of the validation"):
            found = self._probe().groups(own, keys)
        groups = Groups.stack(distributed.gather_objects(found))
        return {"groups/best_beats_direct": groups.best_beats_direct()}

    def check_readiness(self, run_log: RunLog) -> None:
        """Log what RecPO has to choose from before its first step, and warn where that is
        nothing."""
        if not self._diagnoses():
            return
        with self._undisturbed():
            figures = self._readiness()
        record = {f"readiness/{name}": value for name, value in figures.items()}
        run_log.write({"step": 0, **record}, shown=f"before RecPO: {summary(figures)}")
        found = concerns(figures)
        if found and distributed.world()[0] == 0:
            log.warning(advice(found))

    def _readiness(self) -> dict[str, float]:
        examples, probe = self._sample(), self._probe()
        others = other_users(examples.user, self.config.seed)
        keys, own = _own_part(examples)
        with self._local("readiness check"):
            written = probe.greedy(own, keys)
        swapped = None
        if others is not None:
            swapped = Ragged.stack(distributed.gather_objects(written)).select(others[keys])
        with self._local("readiness check"):
            found = probe.measure(own, written, swapped, keys)
        return ReasoningRanks.stack(distributed.gather_objects(found)).figures(examples.user)

    def _diagnoses(self) -> bool:
        wanted = self.config.objective == "recpo" and self.config.diagnostic_samples > 0
        return wanted and len(self.data.valid) > 0

    def _sample(self) -> Examples:
        config = self.config
        return sample_examples(self.data, "valid", config.diagnostic_samples, config.seed)

    def _probe(self) -> ReasoningProbe:
        return ReasoningProbe(
            self.model,
            self.assembler,
            self.data,
            self.engine,
            self.config,
            max_tokens=self.budget.tokens,
        )

    def _ranks(self, examples: Examples, engine: RolloutEngine | None) -> np.ndarray:
        ranks, _ = rank_examples(
            self.model,
            self.assembler,
            self.data,
            examples,
            engine=engine,
            max_completion_length=self.config.max_completion_length,
            max_tokens=self.budget.tokens,
        )
        return ranks

    @contextmanager
    def _local(self, what: str) -> Iterator[None]:
        """Work of this process alone, with the whole weights."""
        with gathered(self.model), together(what) as section:
            section.smallest = "lower max_tokens_per_microbatch or max_tokens_in_flight"
            yield

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Leave the random generators as they are: an engine of the user's may draw from them."""
        generators = random_state()
        try:
            yield
        finally:
            restore_random_state(generators)


def _own_part(examples: Examples) -> tuple[np.ndarray, Examples]:
    """Numbers and examples of this process's part."""
    keys = distributed.own_part(np.arange(len(examples)))
    return keys, examples[keys]

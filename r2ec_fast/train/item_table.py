"""The item table while the model trains: which rows are encoded anew, when, and how old each is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from r2ec_fast.train import distributed
from r2ec_fast.train.fault_tolerance import TokenBudget, together
from r2ec_fast.train.fsdp import gathered

if TYPE_CHECKING:
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.prompts.builder import PromptBuilder
    from r2ec_fast.train.batches import ItemRows, UserBatch

_SAMPLED = 1  # tells this use of (seed, step) from others


class CatalogTable:
    """Keeps the rows of ``model.index`` young.

    ``written_at`` int64 [N] is the optimiser step whose weights encoded each row (-1: not known).
    Three things write rows, and each sets it:

    - with ``fresh_targets`` a step writes its own target items before its rewards (:meth:`wrote`);
    - :meth:`refresh` encodes the whole catalog, each process a part;
    - :meth:`roll` encodes the oldest ``ceil(N / refresh_steps)`` rows, so that a row is at most
      ``refresh_steps`` steps old. Rows that a step wrote are young and wait their turn again.

    Which rows are the oldest depends on ``written_at`` alone (equal ages: lower id first): the
    refresh is deterministic, and a resumed run goes on with it.
    """

    def __init__(
        self,
        model: R2ecModel,
        builder: PromptBuilder,
        config: RecPOConfig,
        num_items: int,
        budget: TokenBudget,
    ) -> None:
        self.model, self.builder, self.config, self.budget = model, builder, config, budget
        self.written_at = np.full(num_items, -1, np.int64)
        self.refreshed_at = -1
        self._tokens: dict[int, np.ndarray] = {}

    def candidate_rows(self, users: Sequence[UserBatch], step: int) -> ItemRows:
        """Tokens of every distinct target of the step, of all processes, and of the items sampled
        beside them (a function of seed and step)."""
        own = np.concatenate([batch.targets for batch in users])
        total = len(self.written_at)
        rng = np.random.default_rng([self.config.seed, step, _SAMPLED])
        sampled = rng.choice(total, min(self.config.sampled_negatives, total), replace=False)
        every = np.concatenate([*distributed.gather_objects(own), sampled])
        wanted = np.unique(every).tolist()
        new = [item for item in wanted if item not in self._tokens]
        self._tokens |= dict(zip(new, self.builder.items_ids(new), strict=True))
        return {item: self._tokens[item] for item in wanted}

    def wrote(self, ids: Sequence[int], step: int) -> None:
        """Note that the weights after ``step`` optimiser steps encoded the rows ``ids``."""
        self.written_at[list(ids)] = step

    def write(self, ids: Sequence[int], step: int) -> None:
        """Encode the rows ``ids`` with the weights after ``step`` steps, each process a part."""
        self.model.write_items(torch.tensor(ids), self._encode(ids))
        self.wrote(ids, step)

    def refresh(self, step: int) -> None:
        """Encode the whole catalog with the weights after ``step`` steps and rebuild the table."""
        rows = self._encode(range(len(self.written_at)))
        self.model.set_items(rows, scan=self.config.index_scan)
        self.written_at[:] = step
        self.refreshed_at = step

    def roll(self, step: int) -> None:
        """Encode the oldest rows with the weights after ``step`` steps and write them."""
        total = len(self.written_at)
        count = -(-total // self.config.refresh_steps)
        # one key a row, all distinct, so that the choice does not hang on how ties are partitioned
        age_then_id = self.written_at * total + np.arange(total)
        oldest = np.sort(np.argpartition(age_then_id, count - 1)[:count])
        self.write(oldest.tolist(), step)

    def refresh_due(self, step: int) -> bool:
        """Whether the whole catalog is to be encoded after ``step``."""
        every = self.config.refresh_steps
        return bool(every) and self.config.refresh_mode == "full" and step % every == 0

    def roll_due(self) -> bool:
        """Whether the oldest rows are to be encoded after every step."""
        return bool(self.config.refresh_steps) and self.config.refresh_mode == "rolling"

    def staleness(self, step: int) -> dict[str, float]:
        """Ages, in optimiser steps, of the rows that gave the rewards of ``step``."""
        age = step - 1 - self.written_at
        return {
            "item_table_age": step - 1 - self.refreshed_at,
            "item_table/max_age": float(age.max()),
            "item_table/mean_age": float(age.mean()),
        }

    def _encode(self, items: Sequence[int]) -> torch.Tensor:
        own = distributed.own_part(items)
        with gathered(self.model), together("catalog refresh") as section:
            section.smallest = "lower max_tokens_per_microbatch"
            states = self.model.encode_rows(self.builder.items_ids(own), self.budget.tokens)
        return distributed.gather_rows(states)

"""What the age of the item table's rows adds to the rewards.

While the model trains, all rows move, most of them towards the users. Where a step's targets have
fresh rows and their rivals old ones, the targets win for their freshness alone: the reward rises
and the ranking does not. So rewards come from rows of one age (docs/guides/training.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from r2ec_fast.train import distributed
from r2ec_fast.train.fault_tolerance import together
from r2ec_fast.train.fsdp import gathered

if TYPE_CHECKING:
    from r2ec_fast.train.batches import Experience
    from r2ec_fast.train.item_table import CatalogTable
    from r2ec_fast.train.update import PolicyUpdate


def staleness_bias(
    experience: Experience,
    step: int,
    *,
    update: PolicyUpdate,
    table: CatalogTable,
    fresh: Sequence[int],
    refresh: Callable[[], None],
) -> float:
    """Mean reward of ``experience`` against ``table`` as the step after ``step`` would find it,
    less the mean against a wholly fresh table; over all processes. Above 0: rewards are too high.

    ``fresh``: ids of the rows that a step writes before its rewards. ``refresh()`` encodes the
    whole catalog with the weights of now; the table is fresh afterwards.
    """
    with gathered(update.model), together("staleness of the rewards"):
        read_outs = update.read_outs(experience)
    if len(fresh):
        table.write(fresh, step)
    with together("staleness of the rewards"):
        before = update.rewards(experience, read_outs)
    refresh()
    with together("staleness of the rewards"):
        after = update.rewards(experience, read_outs)
    own = float((before - after).double().sum()), before.numel()
    sums, counts = zip(*distributed.gather_objects(own), strict=True)
    return sum(sums) / max(sum(counts), 1)


class MeasuredRefresh:
    """Encodes the whole catalog, and says what the age of its rows had added to the rewards."""

    def __init__(self, update: PolicyUpdate, table: CatalogTable) -> None:
        self.update, self.table = update, table
        # the last step's reasonings, and the rows it wrote before it scored them
        self.latest: tuple[Experience, list[int]] | None = None

    def __call__(self, step: int) -> dict[str, float]:
        """Encode with the weights after ``step`` steps; ``reward/staleness_bias`` where a step of
        this process has rewards that could be biased."""
        if self.latest is None or self.table.config.refresh_steps == 1:  # no row is ever old
            self.table.refresh(step)
            return {}
        experience, fresh = self.latest
        bias = staleness_bias(
            experience,
            step,
            update=self.update,
            table=self.table,
            fresh=fresh,
            refresh=lambda: self.table.refresh(step),
        )
        return {"reward/staleness_bias": bias}

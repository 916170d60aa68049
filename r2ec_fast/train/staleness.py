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

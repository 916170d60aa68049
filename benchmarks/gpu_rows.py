"""The rows of the first minutes on a GPU, in the order of the sections that they name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ceilings
import kernel_checks
import kernel_rows
import loss_rows
import rollout_rows
from harness import Entry
from options import Options
from sections import in_order

SUITES: dict[str, Callable[[Options], Iterator[Entry]]] = {
    "ceilings": ceilings.entries,
    "checks": kernel_checks.entries,
    "losses": loss_rows.entries,
    "kernels": kernel_rows.entries,
    "rollout": rollout_rows.entries,
}


def entries(options: Options) -> list[Entry]:
    """Every entry of `SUITES`; those of one section in the order of the suites."""
    return in_order(entry for suite in SUITES.values() for entry in suite(options))

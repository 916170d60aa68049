"""The rank every example's target gets from each method, as a file, and what two files tell.

Two models that are compared on the same examples differ by much less than their tables' standard
errors suggest: what is hard for one is hard for the other. That takes the ranks of the examples,
not their means.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from r2ec_fast.eval.metrics import paired_differences
from r2ec_fast.utils.atomic_files import write_whole

if TYPE_CHECKING:
    from r2ec_fast.data import Examples, RecDataset

KEYS = {"user_id": pl.String, "position": pl.Int64, "item_id": pl.String}


def ranks_table(
    dataset: RecDataset, examples: Examples, ranks: Mapping[str, np.ndarray]
) -> pl.DataFrame:
    """One row an example: user_id and item_id (the target) as text, position (the target's place
    among the user's events, from 0), then a column of ranks (from 1) for every method."""
    data = dataset.data
    keys = {
        "user_id": [str(user) for user in data.users.decode(examples.user)],
        "position": examples.position,
        "item_id": [str(item) for item in data.catalog.ids.decode(dataset.target(examples))],
    }
    return pl.DataFrame({**keys, **ranks}, schema_overrides=KEYS)


def methods_of(table: pl.DataFrame) -> list[str]:
    """The methods that a :func:`ranks_table` holds ranks by."""
    return table.columns[len(KEYS) :]


def save_ranks(table: pl.DataFrame, path: str | os.PathLike[str], argument: str = "path") -> None:
    """Write a :func:`ranks_table` as CSV, whole or not at all."""
    write_whole(path, table.write_csv(), argument)  # Python's errors carry what went wrong


def load_ranks(path: str | os.PathLike[str], argument: str = "path") -> pl.DataFrame:
    """Read what :func:`save_ranks` wrote.

    Raises FileNotFoundError, or ValueError where the file is no table of ranks.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}: no file {os.fspath(path)}")
    try:
        table = pl.read_csv(Path(path), schema_overrides=KEYS)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{argument}: cannot read {os.fspath(path)}: {error}") from error
    methods = methods_of(table)
    whole = all(table[name].dtype == pl.Int64 and not table[name].has_nulls() for name in methods)
    if table.columns[: len(KEYS)] != list(KEYS) or not methods or not whole:
        raise ValueError(
            f"{argument}: expected the columns {', '.join(KEYS)} and one of whole ranks for every "
            f"method in {os.fspath(path)}, got {', '.join(table.columns)}"
        )
    return table


def check_examples(now: pl.DataFrame, before: pl.DataFrame, argument: str = "before") -> None:
    """Raise ValueError unless two tables are of the same examples, in the same order."""
    keys = list(KEYS)
    if not now.select(keys).equals(before.select(keys)):
        raise ValueError(
            f"{argument}: expected ranks of the same {len(now)} examples, got {len(before)} that "
            "are not; evaluate both on one data set, split, sample and seed"
        )


def differences(
    now: pl.DataFrame, before: pl.DataFrame | None = None, argument: str = "before"
) -> dict[str, dict[str, float]]:
    """Paired differences (:func:`~r2ec_fast.eval.metrics.paired_differences`) that a table allows.

    "reasoned - direct" where it holds both, and with the table of another evaluation
    "METHOD - before" for every method that both hold.

    Raises ValueError where the two tables' examples are not the same, or no method is common.
    """
    methods = methods_of(now)
    pairs = {}
    if {"reasoned", "direct"} <= set(methods):
        pairs["reasoned - direct"] = now["reasoned"], now["direct"]
    if before is not None:
        check_examples(now, before, argument)
        common = [name for name in methods if name in before.columns]
        if not common:
            raise ValueError(
                f"{argument}: expected ranks by any of {', '.join(methods)}, got ranks by "
                f"{', '.join(methods_of(before))}"
            )
        pairs |= {f"{name} - before": (now[name], before[name]) for name in common}
    users = now["user_id"].to_numpy()
    return {
        name: paired_differences(a.to_numpy(), b.to_numpy(), users=users)
        for name, (a, b) in pairs.items()
    }

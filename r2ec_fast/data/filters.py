"""Filters on the columns of items, as a request writes them.

A filter is an object; an item passes where every column it names does:

    {"brand": "Acme"}                         equals
    {"genres": ["Comedy", "Drama"]}           equals one of these
    {"price": {"min": 5, "max": 20}}          lies between, the ends included; either may be missing
    {"title": {"contains": "tea"}}            holds the text (case is ignored)

An item without a value in a column does not pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

Scalar = str | int | float | bool
_BOUNDS = frozenset({"min", "max"})


def matching(frame: pl.DataFrame, wanted: Mapping[str, Any]) -> pl.Series:
    """Which rows of ``frame`` pass the filter, bool [N].

    Raises ValueError, naming the column, for one that there is not, and for a condition that does
    not fit its type.
    """
    passes = pl.repeat(True, frame.height, dtype=pl.Boolean, eager=True)
    for column, condition in wanted.items():
        if column not in frame.columns:
            raise ValueError(
                f"filter: the items have no column {column!r}; they have {frame.columns}"
            )
        try:
            own = _condition(column, condition)
            found = frame.select(own.fill_null(False)).to_series()
        except (pl.exceptions.PolarsError, TypeError) as error:
            raise ValueError(
                f"filter: {column}: the column holds {frame[column].dtype}, which "
                f"{condition!r} cannot be compared with"
            ) from error
        passes &= found
    return passes


def _condition(column: str, condition: Any) -> pl.Expr:
    values = pl.col(column)
    if isinstance(condition, Scalar):
        return values == condition
    if isinstance(condition, list) and condition and all(isinstance(v, Scalar) for v in condition):
        return pl.any_horizontal(values == value for value in condition)
    if isinstance(condition, Mapping):
        if set(condition) == {"contains"} and isinstance(condition["contains"], str):
            text = condition["contains"].lower()
            return values.str.to_lowercase().str.contains(text, literal=True)
        bounds = {k: v for k, v in condition.items() if isinstance(v, int | float | str)}
        if bounds and bounds.keys() == condition.keys() <= _BOUNDS:
            parts = []
            if "min" in bounds:
                parts.append(values >= bounds["min"])
            if "max" in bounds:
                parts.append(values <= bounds["max"])
            return pl.all_horizontal(parts)
    raise ValueError(
        f'filter: {column}: expected a value, a list of values, {{"min": ..., "max": ...}} or '
        f'{{"contains": "..."}}, got {condition!r}'
    )

"""Ragged rows of integers: the one form in which prompts, completions and item ids travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias, overload

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Ragged:
    """R rows of integers laid end to end: row r is ``values[offsets[r] : offsets[r + 1]]``.

    A sequence of its rows: ``len``, iteration and ``rows[r]`` give views [length of row r],
    ``rows[a:b]`` is Ragged again.

    Args:
        values: int64 or int32 [E], contiguous.
        offsets: int64 [R + 1], contiguous, from 0 to E without falling; a row may be empty.

    Raises:
        TypeError, ValueError: another type, or offsets that are not these.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        if self.values.dtype not in (np.int32, np.int64) or self.offsets.dtype != np.int64:
            raise TypeError(
                "values must be int32 or int64 and offsets int64, got "
                f"{self.values.dtype} and {self.offsets.dtype}"
            )
        for array in (self.values, self.offsets):
            if array.ndim != 1 or not array.flags.c_contiguous:
                raise ValueError("values and offsets must be one contiguous dimension each")
        _check_offsets(self.offsets, len(self.values))

    @classmethod
    def of(cls, rows: Any, name: str = "rows") -> Ragged:
        """`rows` as Ragged, uncopied where the input allows.

        Takes Ragged, a sequence of rows (lists, 1-D arrays or tensors), a pair (values, offsets) of
        numpy arrays, CPU tensors or anything with `__dlpack__`, an object with `.values()` and
        `.offsets()` (a jagged torch.nested tensor; a KeyedJaggedTensor, whose rows are key-major),
        or an Arrow list array.

        Raises:
            TypeError, ValueError: naming `name`.
        """
        if isinstance(rows, Ragged):
            return rows
        values, offsets = _arrays(rows, name)
        values = integers(values, f"{name} values")
        offsets = integers(offsets, f"{name} offsets").astype(np.int64, copy=False)
        try:
            return cls(np.ascontiguousarray(values), np.ascontiguousarray(offsets))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.values[a:b] for a, b in pairwise(self.offsets.tolist()))

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> Ragged: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | Ragged:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        row = range(len(self))[index]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R]."""
        return np.diff(self.offsets)

    def positions(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Where the values of the rows int64 [S] lie, row after row: indices of `values`, and of
        any array aligned with it."""
        rows = np.asarray(rows, np.int64)
        return _ranges(self.offsets[:-1][rows], self.lengths[rows])

    def select(self, rows: np.ndarray | Sequence[int]) -> Ragged:
        """The rows int64 [S] in that order, repeats allowed: S rows."""
        rows = np.asarray(rows, np.int64)
        return Ragged(self.values[self.positions(rows)], _offsets(self.lengths[rows]))

    def tail(self, start: int) -> Ragged:
        """Every row without its first `start` values, which it must have (ValueError)."""
        lengths = self.lengths - start
        if start < 0 or lengths.min(initial=0) < 0:
            raise ValueError(f"start must be in 0..the shortest row, got {start}")
        return Ragged(self.values[_ranges(self.offsets[:-1] + start, lengths)], _offsets(lengths))

    def join(self, ends: Ragged) -> Ragged:
        """Row r followed by row r of `ends`, which has as many rows."""
        pieces = [piece for pair in zip(self, ends, strict=True) for piece in pair]
        # piece by piece: copying slices is faster than gathering single values
        values = np.concatenate(pieces) if pieces else self.values
        return Ragged(values, self.offsets + ends.offsets)

    def append(self, suffix: Sequence[int]) -> Ragged:
        """Every row followed by the same `suffix`."""
        ends = np.tile(np.asarray(suffix, self.values.dtype), len(self))
        return self.join(Ragged(ends, np.arange(len(self) + 1) * len(suffix)))

    @staticmethod
    def stack(parts: Sequence[Ragged]) -> Ragged:
        """The rows of all `parts` (at least one), one part after the other."""
        lengths = np.concatenate([part.lengths for part in parts])
        return Ragged(np.concatenate([part.values for part in parts]), _offsets(lengths))

    def parts(self, max_values: int) -> Iterator[slice]:
        """Slices of consecutive rows that hold at most `max_values` values, or one row alone."""
        first = 0
        while first < len(self):
            limit = self.offsets[first] + max_values
            last = int(np.searchsorted(self.offsets, limit, side="right")) - 1
            yield slice(first, max(last, first + 1))
            first = max(last, first + 1)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(values [E], offsets int64 [R + 1]) over the same memory: what r2ec_kernels takes as
        `exclude`."""
        return torch.from_numpy(self.values), torch.from_numpy(self.offsets)


# what functions over token rows take: see `Ragged.of`
Rows: TypeAlias = Ragged | Sequence[Sequence[int]] | Sequence[np.ndarray]


def common_prefix(rows: Ragged) -> int:
    """How many values all rows begin with: from 0 to the length of the shortest row."""
    if not len(rows):
        return 0
    shortest, first = int(rows.lengths.min()), rows[0]
    # a block of columns at a time: [R, width] of about a million values
    width = max(64, 2**20 // len(rows))
    for start in range(0, shortest, width):
        columns = np.arange(start, min(start + width, shortest))
        block = rows.values[rows.offsets[:-1, None] + columns]
        same = (block == first[columns]).all(axis=0)
        if not same.all():
            return start + int(same.argmin())
    return shortest


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), then those of starts[1], ..."""
    offsets = _offsets(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


def _check_offsets(offsets: np.ndarray, num_values: int) -> None:
    if len(offsets) == 0:
        raise ValueError("offsets must hold at least the entry 0, got an empty array")
    if offsets[0] != 0:
        raise ValueError(f"offsets must start at 0, got {offsets[0]}")
    for row in np.flatnonzero(offsets[1:] < offsets[:-1])[:1]:
        raise ValueError(
            f"offsets must not fall, got {offsets[row]} then {offsets[row + 1]} at row {row}"
        )
    if offsets[-1] != num_values:
        raise ValueError(
            f"the last offset must be the number of values ({num_values}), got {offsets[-1]}"
        )


# ---- foreign forms ------------------------------------------------------------------------------


def _arrays(rows: Any, name: str) -> tuple[Any, Any]:
    """Values and offsets of foreign rows, in whatever type they come."""
    if isinstance(rows, tuple) and len(rows) == 2 and not isinstance(rows[0], list):
        return rows
    if type(rows).__module__.startswith("pyarrow"):
        return _arrow_arrays(rows, name)
    if callable(getattr(rows, "values", None)) and callable(getattr(rows, "offsets", None)):
        nested: Any = rows
        if isinstance(rows, torch.Tensor) and nested.lengths() is not None:
            raise ValueError(f"{name}: a nested tensor with holes (lengths()) has no plain rows")
        return rows.values(), rows.offsets()
    if isinstance(rows, Sequence) and not isinstance(rows, str | bytes):
        parts = [integers(row, name) for row in rows]
        values = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return values, _offsets(np.array([len(part) for part in parts], np.int64))
    raise TypeError(
        f"{name} must be a sequence of token rows, a pair (values, offsets), a jagged tensor "
        f"or an Arrow list array, got {type(rows).__name__}"
    )


def _arrow_arrays(array: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    if hasattr(array, "chunks"):
        array = array.combine_chunks()
    if not hasattr(array, "offsets") or array.null_count or array.values.null_count:
        raise TypeError(f"{name} must be an Arrow list array without nulls, got {array.type}")
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    values = array.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]]
    return values, offsets - offsets[0]


def integers(array: Any, name: str) -> np.ndarray:
    """A 1-D integer numpy array over the same memory where the type allows: int32 or int64."""
    if isinstance(array, torch.Tensor):
        if array.device.type != "cpu":
            raise ValueError(f"{name} must be in CPU memory, got a tensor on {array.device}")
        array = array.detach().numpy()
    elif hasattr(array, "__dlpack__") and not isinstance(array, np.ndarray):
        array = np.from_dlpack(array)
    array = np.asarray(array)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise TypeError(f"{name} must hold integers of at most 63 bits, got {array.dtype}")
    return array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)

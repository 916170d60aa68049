"""Checks of arguments that several ops share. An error names the argument, what was expected and
what came."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ._dispatch import checks_enabled

SIMILARITIES = ("dot", "cosine", "l2")
TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ITEMS = 2**32 - 1  # an order key holds an id in 32 bits
IGNORE = -100  # a token target that is not counted: no loss, log_prob 0

Ids = torch.Tensor | np.ndarray | Sequence[int]  # what callers may give for int64 ids


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def as_int(name: str, value: Any, low: int) -> int:
    """An integer of any kind (numpy's too) of at least ``low`` as an int; ``SymInt`` as it is."""
    if not isinstance(value, torch.SymInt):
        dtype = getattr(value, "dtype", None)
        try:
            if isinstance(value, bool) or dtype in (torch.bool, np.bool_):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an int, got {_kind(value)}") from None
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")
    return value


def as_first_id(first_id: Any, count: int) -> int:
    """The id of the first of ``count`` rows of a split table as an int."""
    first_id = as_int("first_id", first_id, 0)
    if first_id > MAX_ITEMS - count:
        raise ValueError(f"first_id: expected 0..{MAX_ITEMS - count}, got {first_id}")
    return first_id


def as_number(name: str, value: Any) -> float:
    """A number of any kind as a float."""
    if not isinstance(value, (str, bytes, bool)):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise TypeError(f"{name}: expected a number, got {_kind(value)}")


def is_array(value: Any) -> bool:
    """Whether ``value`` is a tensor, or an array that numpy can read."""
    return isinstance(value, torch.Tensor) or hasattr(value, "__array__")


def as_ids(
    name: str, value: Any, dims: int = 1, device: torch.device | None = None
) -> torch.Tensor:
    """int64 of ``dims`` dimensions from a tensor or array of integers, or (one dimension) a list,
    tuple or range of them. ``device``: where what is no tensor goes."""
    shape = "[n]" if dims == 1 else "[B, L]"
    if isinstance(value, torch.Tensor):
        check_dense(name, value)
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if not whole or value.is_quantized:
            raise TypeError(f"{name}: expected int64 {shape}, got {value.dtype}")
        ids = value.to(torch.int64)
    elif is_array(value):
        array = np.asarray(value)
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"{name}: expected int64 {shape}, got an array of {array.dtype}")
        ids = torch.from_numpy(array.astype(np.int64)).to(device)
    elif isinstance(value, (list, tuple, range)):
        numbers = [as_int(f"{name}[{at}]", number, -(2**63)) for at, number in enumerate(value)]
        if numbers and max(numbers) >= 2**63:
            raise ValueError(f"{name}: expected int64, got {max(numbers)}")
        ids = torch.tensor(numbers, dtype=torch.int64, device=device)
    else:
        raise TypeError(f"{name}: expected int64 {shape}, an array or list, got {_kind(value)}")
    if ids.dim() != dims:
        raise ValueError(f"{name}: expected shape {shape}, got {list(ids.shape)}")
    return ids


def check_dense(name: str, value: Any) -> None:
    """Raise unless ``value`` is a tensor whose numbers can be read one by one."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_kind(value)}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")
    if value.device.type == "meta":
        raise ValueError(f"{name}: expected device with values, got a tensor on meta")


def _kind(value: Any) -> str:
    """What an argument is, for messages: no two kinds have one name."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype}, shape {list(value.shape)}"
    if isinstance(value, (np.ndarray, np.generic)):
        return f"numpy {type(value).__name__} of {value.dtype}, shape {list(value.shape)}"
    return type(value).__name__


def check_vectors(
    name: str, vectors: torch.Tensor, d: int | None = None, device: torch.device | None = None
) -> None:
    """Raise unless ``vectors`` is a floating [rows, d] tensor on ``device``."""
    check_dense(name, vectors)
    if vectors.dtype not in TABLE_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {vectors.dtype}")
    if vectors.dim() != 2 or vectors.shape[1] == 0 or d not in (None, vectors.shape[1]):
        shape = f"[rows, {'d >= 1' if d is None else d}]"
        raise ValueError(f"{name}: expected shape {shape}, got {list(vectors.shape)}")
    if vectors.shape[0] > MAX_ITEMS:
        raise ValueError(f"{name}: expected at most {MAX_ITEMS} rows, got {vectors.shape[0]}")
    if device is not None and vectors.device != device:
        raise ValueError(f"{name}: expected device {device}, got {vectors.device}")


def check_scoring(similarity: str, temperature: float) -> None:
    """Raise unless ``similarity`` is known and ``temperature`` positive and finite."""
    one_of("similarity", similarity, SIMILARITIES)
    number = as_number("temperature", temperature)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")


def check_float(name: str, value: torch.Tensor, dims: int) -> None:
    check_dense(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if value.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {list(value.shape)}")


def check_widths(
    left: str, first: torch.Tensor, right: str, second: torch.Tensor, rows: tuple[str, str]
) -> None:
    """Raise unless two floating matrices have one width; ``rows``: how their rows are numbered."""
    check_float(left, first, 2)
    check_float(right, second, 2)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{left} and {right}: expected [{rows[0]}, d] and [{rows[1]}, d], got "
            f"{list(first.shape)} and {list(second.shape)}"
        )


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a number above 0."""
    if not as_number(name, value) > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")


def check_shape(name: str, value: torch.Tensor, shape: list[int]) -> None:
    if list(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def reads_values(value: torch.Tensor) -> bool:
    """Whether a call checks the values of ``value``: on a GPU that waits for them."""
    if torch.compiler.is_compiling():
        return False
    return value.device.type == "cpu" or checks_enabled()


def check_ids(
    name: str, value: torch.Tensor, length: int, low: int, high: int, ignore: bool = False
) -> None:
    """int64 [length] in low..high-1, or IGNORE. GPU tensors' values only under R2EC_CHECK=1."""
    check_dense(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    check_shape(name, value, [length])
    if not reads_values(value):
        return
    wrong = (value < low) | (value >= high)
    if ignore:
        wrong &= value != IGNORE
    if bool(wrong.any()):
        allowed = f"{low}..{high - 1}" + (f" or {IGNORE}" if ignore else "")
        raise ValueError(f"{name}: expected values in {allowed}, got {int(value[wrong][0])}")

"""Checks of arguments that several ops share. An error names the argument, what was expected and
what came."""

import math

import torch

from ._dispatch import checks_enabled

SIMILARITIES = ("dot", "cosine", "l2")
TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ITEMS = 2**32 - 1  # an order key holds an id in 32 bits
IGNORE = -100  # a token target that is not counted: no loss, log_prob 0


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def check_vectors(
    name: str, vectors: torch.Tensor, d: int | None = None, device: torch.device | None = None
) -> None:
    """Raise unless ``vectors`` is a floating [rows, d] tensor on ``device``."""
    if not isinstance(vectors, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(vectors).__name__}")
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
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")


def check_float(name: str, value: torch.Tensor, dims: int) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
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
    if not value > 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")


def check_shape(name: str, value: torch.Tensor, shape: list[int]) -> None:
    if list(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def check_ids(
    name: str, value: torch.Tensor, length: int, low: int, high: int, ignore: bool = False
) -> None:
    """int64 [length] in low..high-1, or IGNORE. GPU tensors' values only under R2EC_CHECK=1."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected an int64 tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    check_shape(name, value, [length])
    if torch.compiler.is_compiling() or not (value.device.type == "cpu" or checks_enabled()):
        return
    wrong = (value < low) | (value >= high)
    if ignore:
        wrong &= value != IGNORE
    if bool(wrong.any()):
        allowed = f"{low}..{high - 1}" + (f" or {IGNORE}" if ignore else "")
        raise ValueError(f"{name}: expected values in {allowed}, got {int(value[wrong][0])}")

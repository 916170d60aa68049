"""Ranges of settings, written in their types.

A dataclass of settings says beside each field what it may hold, and `check_ranges` reads it there:

    steps: Annotated[int, AtLeast(1)] = 100
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Protocol, get_args, get_origin, get_type_hints

from r2ec_kernels._checks import one_of


class Range(Protocol):
    """What a setting may hold."""

    def check(self, name: str, value: Any) -> None:
        """Raise an error that names the setting, what was expected and what came."""


@dataclass(frozen=True, init=False)
class OneOf:
    """One of these words."""

    allowed: tuple[str, ...]

    def __init__(self, *allowed: str) -> None:
        object.__setattr__(self, "allowed", allowed)

    def check(self, name: str, value: Any) -> None:
        one_of(name, value, self.allowed)


@dataclass(frozen=True)
class AtLeast:
    """A number that is not below ``least``."""

    least: float

    def check(self, name: str, value: Any) -> None:
        if not _number(name, value) >= self.least:
            raise ValueError(f"{name}: expected at least {self.least}, got {value}")


@dataclass(frozen=True)
class MoreThan:
    """A number above ``bound``."""

    bound: float

    def check(self, name: str, value: Any) -> None:
        if not _number(name, value) > self.bound:
            raise ValueError(f"{name}: expected more than {self.bound}, got {value}")


@dataclass(frozen=True)
class Between:
    """A number in ``least``..``most``, both included."""

    least: float
    most: float

    def check(self, name: str, value: Any) -> None:
        if not self.least <= _number(name, value) <= self.most:
            raise ValueError(f"{name}: expected {self.least} to {self.most}, got {value}")


PositiveInt = Annotated[int, AtLeast(1)]
NonNegativeInt = Annotated[int, AtLeast(0)]
PositiveFloat = Annotated[float, MoreThan(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
Fraction = Annotated[float, Between(0, 1)]


def check_ranges(settings: object) -> None:
    """Raise ValueError or TypeError for the first field outside its range; None is in the range of
    a field that may be None."""
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        if get_origin(kind) is not Annotated:
            continue
        inner, *ranges = get_args(kind)
        value = getattr(settings, name)
        if value is None and type(None) in get_args(inner):
            continue
        for allowed in ranges:
            allowed.check(name, value)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)

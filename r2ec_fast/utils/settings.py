"""Ranges of settings, written in their types, and old names of settings.

A dataclass of settings says beside each field what it may hold, and `check_ranges` reads it there:

    steps: Annotated[int, AtLeast(1)] = 100
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Protocol, TypeVar, get_args, get_origin, get_type_hints

from r2ec_kernels._checks import one_of

T = TypeVar("T")


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


# ---- old names ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renamed:
    """The present name of a setting and, where its values changed too, the present ones by their
    old names."""

    name: str
    values: Mapping[str, str] | None = None

    def now(self, old_name: str, value: Any) -> Any:
        """The present value of an old one; ValueError where there was none such."""
        if self.values is None:
            return value
        one_of(old_name, value, tuple(self.values))
        return self.values[value]

    def before(self, value: Any) -> Any:
        """The old value of a present one; itself where it had none."""
        return {new: old for old, new in (self.values or {}).items()}.get(value, value)

    def __str__(self) -> str:
        pairs = (f"{old} = {new}" for old, new in (self.values or {}).items())
        return f"{self.name} ({', '.join(pairs)})" if self.values else self.name


_warned: set[str] = set()  # old names that this process was warned of


def accept_old_names(
    renamed: Mapping[str, Renamed], *, removed_in: str
) -> Callable[[type[T]], type[T]]:
    """Decorate a dataclass so that old names of its fields work, as arguments and as attributes.

    The first use of each in a process is a FutureWarning that names both and the release that
    removes the old one. Old and new as arguments of one call are a ValueError.
    """

    def warn(old: str) -> None:
        if old not in _warned:
            _warned.add(old)
            message = f"{old} is now {renamed[old]}; release {removed_in} removes the old name"
            warnings.warn(message, FutureWarning, stacklevel=3)

    def attribute(old: str, new: Renamed) -> property:
        def read(self: T) -> Any:
            warn(old)
            return new.before(getattr(self, new.name))

        def write(self: T, value: Any) -> None:
            warn(old)
            setattr(self, new.name, new.now(old, value))

        return property(read, write)

    def decorate(cls: type[T]) -> type[T]:
        plain = cls.__init__

        @functools.wraps(plain)
        def init(self: T, *args: Any, **values: Any) -> None:
            for old in [name for name in renamed if name in values]:
                new, value = renamed[old], values.pop(old)
                if new.name in values:
                    raise ValueError(f"{old}, {new.name}: one setting twice, give {new.name} only")
                values[new.name] = new.now(old, value)
                warn(old)
            plain(self, *args, **values)

        cls.__init__ = init  # type: ignore[method-assign, assignment]
        for old, new in renamed.items():
            setattr(cls, old, attribute(old, new))
        return cls

    return decorate

"""The first minutes on a GPU: what comes when, and how much of the time it may take."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol, TypeVar

REST = "the rest"  # of a row that does not say


class Section(NamedTuple):
    """``share``: of the seconds, that its rows may take before the next section begins."""

    name: str
    share: float


# What later numbers stand on comes first, then what is most wanted.
SECTIONS = (
    Section("ceilings", 0.04),
    Section("correctness", 0.30),
    Section("item head", 0.22),
    Section("ranks", 0.08),
    Section("index", 0.08),
    Section("loss", 0.12),
    Section("decode", 0.08),
    Section("profile", 0.04),
    Section("graph", 0.02),
    Section(REST, 0.02),
)


class Placed(Protocol):
    """What names its section: an `Entry`."""

    @property
    def section(self) -> str: ...


T = TypeVar("T", bound=Placed)


def in_order(entries: Iterable[T]) -> list[T]:
    """Entries by the order of their sections, within one as given.

    Raises ValueError for a section that is not in `SECTIONS`.
    """
    places = {section.name: place for place, section in enumerate(SECTIONS)}
    found = list(entries)
    for entry in found:
        if entry.section not in places:
            raise ValueError(
                f"section: expected one of {', '.join(places)}, got {entry.section!r} of {entry}"
            )
    return sorted(found, key=lambda entry: places[entry.section])

"""What happens when a process runs out of memory or fails, so that the others never wait for it.

Processes exchange values at fixed places of a step. Work between two exchanges is done inside
:func:`together`: it ends with one small exchange, so that all processes leave it alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from r2ec_fast.train import distributed
from r2ec_fast.utils.memory import free_memory, is_out_of_memory
from r2ec_fast.utils.random_state import random_state, restore_random_state

log = logging.getLogger(__name__)

T = TypeVar("T")

_LINKED = "with sharded weights a step cannot be done again; lower max_tokens_per_microbatch"


class StepOutOfMemory(RuntimeError):
    """Some process ran out of memory; every process raises it at the same place.

    ``hopeless``: smaller micro-batches cannot help.
    """

    def __init__(self, message: str, hopeless: bool) -> None:
        super().__init__(message)
        self.hopeless = hopeless


@dataclass
class Section:
    """What runs inside :func:`together`. ``smallest``: set where the work cannot be divided any
    further, the text that says what to do then."""

    smallest: str | None = None


@dataclass(frozen=True)
class _Failure:
    text: str
    memory: bool
    smallest: str | None


@contextmanager
def together(what: str, *, linked: bool = False) -> Iterator[Section]:
    """Local work, without exchanges, that every process does at this place.

    ``linked``: the work itself exchanges (sharded weights). A process that fails then cannot wait
    for the others: it raises at once, and they find it gone.

    If memory ran out on some processes, all raise StepOutOfMemory. If anything else failed, the
    process raises its own error and every other one distributed.PeerError, which says whose.
    """
    section, failure, own = Section(), None, None
    try:
        yield section
    except distributed.PeerError:
        raise
    except BaseException as error:
        memory = is_out_of_memory(error)
        if linked and memory:
            raise StepOutOfMemory(f"{what}: {error}; {_LINKED}", hopeless=True) from error
        if linked and distributed.is_exchange_error(error):
            raise distributed.lost_peer(error) from error
        if linked:
            raise
        failure = _Failure(f"{type(error).__name__}: {error}", memory, section.smallest)
        if not memory:
            own = error
    if own is not None and not isinstance(own, Exception):
        raise own  # an interrupt: the others see the connection close
    if not distributed.any_(failure is not None):
        return
    failures = distributed.gather_objects(failure)
    found = [(rank, f) for rank, f in enumerate(failures) if f is not None]
    if all(f.memory for _, f in found):
        rank, worst = next(((r, f) for r, f in found if f.smallest), found[0])
        message = f"{what}: process {rank} ran out of memory ({worst.text})"
        if worst.smallest:
            message += f"; {worst.smallest}"
        raise StepOutOfMemory(message, hopeless=worst.smallest is not None)
    if own is not None:
        raise own
    rank, other = next((r, f) for r, f in found if not f.memory)
    raise distributed.PeerError(f"{what}: process {rank} failed ({other.text})")


class TokenBudget:
    """Tokens of one forward and backward pass: the same number on every process. ``lowered``: it
    is less than was asked for, because memory ran out."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.lowered = tokens, False

    def lower(self, tokens: int) -> None:
        """At most ``tokens`` from now on."""
        self.tokens, self.lowered = max(min(tokens, self.tokens), 1), True

    def spend(self, attempt: Callable[[], T], reset: Callable[[], None]) -> tuple[T, int]:
        """``attempt()``, again with half the budget where memory ran out on any process.

        ``reset`` puts back what a failed attempt changed; the generators are put back here.
        Returns the result and how often the budget was halved. Raises StepOutOfMemory where a part
        that cannot be divided does not fit.
        """
        generators = random_state()
        retries = 0
        while True:
            try:
                return attempt(), retries
            except StepOutOfMemory as error:
                if error.hopeless:
                    raise
                reason = str(error)
            # outside of the handler: the error holds the failed attempt's activations
            reset()
            restore_random_state(generators)
            free_memory()
            self.lower(self.tokens // 2)
            retries += 1
            log.warning(
                "%s; the step is done again with micro-batches of %d tokens on all processes",
                reason,
                self.tokens,
            )

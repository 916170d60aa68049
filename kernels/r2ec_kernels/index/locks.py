"""A lock that many readers share and one writer holds alone, which no interrupt leaves held.

Ctrl-C raises KeyboardInterrupt between any two steps of Python code, in the code that takes or
releases a lock too. So who holds the lock is nothing but which of some plain locks are locked, and
those are taken and released by ``with`` alone, whose two ends no interrupt can part:

- every reader holds a lock of its own while it works, and is listed;
- the gate is held by a writer from the time it waits until it is done, and by a reader while it is
  listed. A writer waits until each listed reader's lock is free. A reader that was interrupted
  leaves at most a free lock in the list.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class SharedLock:
    """Readers run together; a waiting writer goes before readers that come later."""

    def __init__(self, repair: Callable[[], None] | None = None) -> None:
        """repair: called before any work begins, while nobody holds the lock or before readers are
        let in: undoes what an interrupted writer left half done. It must be cheap where nothing
        is."""
        self._gate = threading.Lock()
        self._readers: set[threading.Lock] = set()
        self._repair = repair

    def shared(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns, with the lock held together with other readers."""
        own = threading.Lock()
        with own:
            with self._gate:
                if self._repair is not None:
                    self._repair()
                self._readers.add(own)
            try:
                return work()
            finally:
                self._readers.discard(own)

    def alone(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns, with the lock held alone."""
        with self._gate:
            for reader in tuple(self._readers):
                with reader:  # once it is done
                    pass
                self._readers.discard(reader)
            if self._repair is not None:
                self._repair()
            return work()

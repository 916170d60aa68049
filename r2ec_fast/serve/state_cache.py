"""User states that are kept: a repeated request then costs one search of the table."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

from r2ec_fast.serve.jobs import UserState


class StateCache:
    """The states used last, for one model with weights that stay.

    A state depends on the prompt, the mode and the length allowed for the reasoning, not on the
    item table, so changes of the table leave it right.

    Args:
        entries: most states kept; 0: none.
        seconds: how long one is kept.
    """

    def __init__(
        self, entries: int, seconds: float, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._entries, self._seconds, self._now = entries, seconds, now
        self._kept: OrderedDict[Hashable, tuple[float, UserState]] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> UserState | None:
        with self._lock:
            found = self._kept.get(key)
            if found is not None and self._now() - found[0] > self._seconds:
                del self._kept[key]
                found = None
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return found[1]

    def put(self, key: Hashable, state: UserState) -> None:
        with self._lock:
            if self._entries:
                self._kept[key] = (self._now(), state)
                self._kept.move_to_end(key)
            while len(self._kept) > self._entries:
                self._kept.popitem(last=False)

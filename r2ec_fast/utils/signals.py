"""A run that was told to end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class RunStopped(RuntimeError):
    """SIGTERM ended a run, which has saved what it needs to go on; the message says how."""


@contextmanager
def sigterm_raises(message: str) -> Iterator[None]:
    """SIGTERM raises ``RunStopped(message)`` in the block, where that is the main thread's; a
    handler that is set inside, as a trainer's is, goes before it."""

    def stop(*_: object) -> None:
        raise RunStopped(message)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

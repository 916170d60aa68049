"""What a request asks of the worker, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from r2ec_fast.serve.catalog.live import Found


class QueueFull(RuntimeError):
    """So many requests wait that another one is refused; ``retry_after`` is in seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already")
        self.retry_after = retry_after


class ShuttingDown(RuntimeError):
    """The server takes no new requests."""


class DeadlineExceeded(RuntimeError):
    """A request's time was over before it was answered."""


class EngineUnavailable(ConnectionError):
    """The server that writes reasonings is away, or refused one."""


@dataclass(frozen=True)
class Search:
    """What is looked for with a user's state.

    Attributes:
        k: items.
        exclude: rows of the table that are not found.
        wanted: filter on the items' columns (`filters`).
        include: external ids of the only items that may be found.
    """

    k: int
    exclude: Sequence[int] = ()
    wanted: Mapping[str, Any] | None = None
    include: Sequence[Hashable] | None = None

    @property
    def group(self) -> str:
        """Searches of one group can be made together."""
        return repr((self.wanted, self.include))


@dataclass(frozen=True)
class UserState:
    """A user's state, and how it came about; it does not depend on the item table.

    Attributes:
        state: [d].
        reasoning: the text written before; None in direct mode.
        finish_reason: "direct", "answer" (the reasoning ended itself), "eos" or "length".
        completion_tokens: tokens of the reasoning.
    """

    state: torch.Tensor
    reasoning: str | None
    finish_reason: str
    completion_tokens: int

    @classmethod
    def of(cls, state: torch.Tensor, written: Written | None) -> UserState:
        """A state read after what was written, if anything was."""
        if written is None:
            return cls(state, None, "direct", 0)
        return cls(state, written.text, written.finish_reason, written.completion_tokens)


@dataclass(frozen=True)
class Written:
    """A reasoning that a `Writer` brings.

    Attributes:
        tokens: all that is read between the prompt and the state, the marker included.
        text, finish_reason, completion_tokens: see `UserState`.
        state: [d]; None: it is yet to be read.
    """

    tokens: list[int]
    text: str
    finish_reason: str
    completion_tokens: int
    state: torch.Tensor | None = None


@dataclass
class Answer:
    """What a job comes to. ``found`` and ``version`` are None where no search was asked for;
    ``seconds``: of the stages "queue", "prompt", "reasoning", "search"."""

    user: UserState
    found: Found | None
    version: int | None
    cached: bool
    seconds: dict[str, float]


@dataclass
class Job:
    """A request on its way through the worker.

    Attributes:
        prompt: int64 [n], token ids.
        limit: longest reasoning (tokens); 0: direct mode.
        search: None: the state is all that is wanted.
        deadline: of `time.monotonic`; None: none.
        on_text: called in the worker's thread with each new piece of the reasoning.
        future: cancelled by whoever does not want the answer any more.
        written: what a `Writer` wrote.
    """

    prompt: np.ndarray
    limit: int
    search: Search | None
    deadline: float | None = None
    on_text: Callable[[str], None] | None = None
    future: Future[Answer] = field(default_factory=Future)
    user: UserState | None = None
    written: Written | None = None
    cached: bool = False
    shown: int = 0  # characters of the reasoning that on_text has had
    marks: dict[str, float] = field(default_factory=lambda: {"arrived": time.monotonic()})

    @property
    def key(self) -> tuple[bytes, int]:
        """What its state depends on, for one state of the model's weights."""
        return self.prompt.astype(np.int64).tobytes(), self.limit

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.done()

    def row(self, marker: Sequence[int]) -> np.ndarray:
        """All that is read before its state."""
        rest = marker if self.written is None else self.written.tokens
        return np.concatenate([self.prompt, np.asarray(rest, np.int64)])

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, time.monotonic())

    def expire(self, now: float) -> bool:
        """End it where its time is over; whether it has ended."""
        if not self.future.done() and self.deadline is not None and now > self.deadline:
            self.fail(DeadlineExceeded("the request's time was over before it was answered"))
        return self.future.done()

    def fail(self, error: BaseException) -> None:
        if not self.over and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def finish(self, found: Found | None, version: int | None) -> None:
        assert self.user is not None
        self.mark("done")
        if self.future.set_running_or_notify_cancel():
            answer = Answer(self.user, found, version, self.cached, self._seconds())
            self.future.set_result(answer)

    def _seconds(self) -> dict[str, float]:
        stages = {"queue": "started", "prompt": "read", "reasoning": "written", "search": "done"}
        seconds, before = {}, self.marks["arrived"]
        for stage, end in stages.items():
            at = self.marks.get(end, before)
            seconds[stage], before = at - before, at
        return seconds


class Writer(Protocol):
    """Writes reasonings outside the worker's thread.

    Attributes:
        slots: jobs it works at together.
    """

    slots: int

    def start(self, job: Job, done: Callable[[Job], None]) -> None:
        """Give the job its ``written``, or fail it, and then call ``done`` in any thread; a job
        that is cancelled or whose time is over is given up."""

    def close(self) -> None:
        """End its threads; nothing is under way any more."""

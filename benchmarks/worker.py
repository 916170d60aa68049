"""A benchmark process that another one talks to, a line of JSON each way.

`serve` says which machine it is on and which entries it has, then answers: {"open": key} builds an
entry and passes its gates; {"time": method} runs one case of the open entry once; {"measure": key}
does all of it, for the named "methods" alone where there are some, and says before each run whose
it is. A separate process can be given another checkout, Triton's interpreter, or a time limit, and
may die without taking the table along: after an error that leaves a GPU unusable it does.

The asking side needs no torch.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from rows import Machine, Row

if TYPE_CHECKING:
    from harness import Entry, Settings

FATAL = ("CUDA error", "HIP error", "AcceleratorError", "device-side assert", "illegal memory")


class WorkerDied(Exception):
    """The process ended; the message holds the end of what it wrote to stderr."""


@dataclasses.dataclass(frozen=True)
class Offer:
    """An entry as its worker describes it."""

    key: str
    section: str
    suite: str
    op: str
    shape: dict[str, int | float | str]
    methods: tuple[str, ...]
    versus: str

    def row(self, method: str, status: str, note: str = "") -> Row:
        return Row(self.suite, self.op, self.shape, method, status, note, versus=self.versus)


def serve(
    entries: Sequence[Entry], settings: Settings, machine: Machine, spent: Mapping[str, float]
) -> None:
    """Answer questions on stdin until it closes. Everything else that prints goes to stderr.

    ``spent``: seconds that the start took, by what they went into.
    """
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    by_key = {entry.key: entry for entry in entries}
    offers = [_offer(entry) for entry in entries]
    _send(answers, {"machine": machine.as_dict(), "entries": offers, "spent": dict(spent)})
    session = _Session(settings, machine, answers)
    for line in sys.stdin:
        question = json.loads(line)
        if "time" in question:
            _send(answers, session.time(question["time"]))
        elif "open" in question:
            _send(answers, session.open(by_key[question["open"]]))
        else:
            entry = by_key[question["measure"]]
            entry = dataclasses.replace(entry, methods=tuple(question["methods"]))
            _send(answers, session.measure(entry, question["within"]))


class _Session:
    """What a serving process does and keeps between two questions."""

    def __init__(self, settings: Settings, machine: Machine, answers: TextIO) -> None:
        from machine import Timer

        self.settings, self.machine, self.answers = settings, machine, answers
        self.timer, self.cases = Timer(settings.device), {}

    def open(self, entry: Entry) -> dict:
        import harness

        self.cases = {}
        alive, rows, first = harness.open_entry(entry, self.settings)
        self.cases = {case.method: case for case in alive}
        seconds = {case.method: s for case, s in zip(alive, first, strict=True)}
        return {"rows": [row.as_dict() for row in rows], "seconds": seconds}

    def time(self, method: str) -> dict:
        return {"seconds": self.timer(self.cases[method].run)}

    def measure(self, entry: Entry, within: float) -> dict:
        import harness

        self.cases, spent = {}, {}
        settings = dataclasses.replace(
            harness.stopped_by(self.settings, within),
            spent=spent,
            begin=lambda method: _send(self.answers, {"begun": method}),
            fatal=lambda error: any(word in f"{type(error).__name__} {error}" for word in FATAL),
        )
        rows = harness.measure(entry, settings, self.machine)
        return {"rows": [row.as_dict() for row in rows], "spent": spent}


def _offer(entry: Entry) -> dict[str, object]:
    names = [field.name for field in dataclasses.fields(Offer)]
    return {name: getattr(entry, name) for name in names}


def _end_with_parent() -> None:
    """A killed parent takes this process along, which would otherwise keep the GPU busy."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _send(stream: TextIO, answer: Mapping[str, object]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


class Worker:
    """The other end of `serve`.

    Args:
        command: what to start.
        environment: variables added to this process's own.
        timeout: seconds until it must have said which machine it is on.

    Attributes:
        machine, offers, spent: what it said of itself.
        begun: the method it last began to run, None before the first of a question.

    Raises:
        WorkerDied: it ended. TimeoutError: no answer in time; it was killed.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], timeout: float
    ) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as this
        self._process = subprocess.Popen(
            list(command),
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._pending = b""
        self.begun: str | None = None
        said = self._answer(timeout)
        self.machine, self.spent = Machine(**said["machine"]), said["spent"]
        self.offers = [
            Offer(**offer | {"methods": tuple(offer["methods"])}) for offer in said["entries"]
        ]

    def ask(self, question: Mapping[str, object], timeout: float) -> dict:
        self.begun = None
        try:
            self._process.stdin.write((json.dumps(question) + "\n").encode())
        except BrokenPipeError as error:
            raise WorkerDied(self._last_words()) from error
        return self._answer(timeout)

    def stop(self) -> None:
        """End the process; idempotent."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()
        self._selector.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answer(self, timeout: float) -> dict:
        deadline = time.monotonic() + timeout
        while True:
            said = json.loads(self._line(deadline, timeout))
            if "begun" not in said:
                return said
            self.begun = said["begun"]

    def _line(self, deadline: float, timeout: float) -> bytes:
        while b"\n" not in self._pending:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                self.stop()
                raise TimeoutError(f"no answer within {timeout:.0f} s")
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            if not read:
                words = self._last_words()
                self.stop()
                raise WorkerDied(words)
            self._pending += read
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _last_words(self) -> str:
        """Why the process ended: the signal, else the last error that it printed."""
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return (errors or lines or ["it said nothing"])[-1][:300]

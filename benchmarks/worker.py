"""A benchmark process that another one talks to, a line of JSON each way.

`serve` answers: {"open": key} builds an entry and passes its gates; {"time": method} runs one case
of the open entry once; {"measure": key} does all of it. A separate process can be given another
checkout, Triton's interpreter, or a time limit, and may die without taking the table along.
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

import harness
from harness import Entry, Settings
from machine import Machine, Timer


class WorkerDied(Exception):
    """The process ended; the message holds the end of what it wrote to stderr."""


def serve(entries: Mapping[str, Entry], settings: Settings, machine: Machine) -> None:
    """Answer questions on stdin until it closes. Everything else that prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _send(answers, {"machine": machine.as_dict()})
    timer, cases = Timer(settings.device), {}
    for line in sys.stdin:
        question = json.loads(line)
        if "open" in question:
            alive, rows, first = harness.open_entry(entries[question["open"]], settings)
            cases = {case.method: case for case in alive}
            seconds = {case.method: s for case, s in zip(alive, first, strict=True)}
            _send(answers, {"rows": [row.as_dict() for row in rows], "seconds": seconds})
        elif "time" in question:
            _send(answers, {"seconds": timer(cases[question["time"]].run)})
        else:
            cases = {}
            within = harness.stopped_by(settings, question["within"])
            rows = harness.measure(entries[question["measure"]], within, machine)
            _send(answers, {"rows": [row.as_dict() for row in rows]})


def _send(stream: TextIO, answer: Mapping[str, object]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


class Worker:
    """The other end of `serve`.

    Args:
        command: what to start.
        environment: variables added to this process's own.
        timeout: seconds until it must have said which machine it is on.

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
        self.machine = Machine(**self._answer(timeout)["machine"])

    def ask(self, question: Mapping[str, object], timeout: float) -> dict:
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

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answer(self, timeout: float) -> dict:
        deadline = time.monotonic() + timeout
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
        return json.loads(line)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

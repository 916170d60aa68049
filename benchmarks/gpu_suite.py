"""``--suite gpu --budget SECONDS --resume FILE``: a rented hour, used in the order of value.

Needs torch, triton, numpy, pybind11 and transformers alone. Builds the C++ extension if it is
missing, runs the tests marked ``gpu``, then one row of every Triton kernel, one recommendation end
to end, and the rest. Rows run in a process of their own, one after the other: a row that crashes or
runs out of time costs itself. The file is rewritten after every row and says what is done, so the
next call goes on from there.

Without a GPU the same kernel rows run in a tiny size in Triton's interpreter: results are checked
and nothing is timed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness import Entry, Row
from machine import ROOT, describe
from registry import Options, all_entries
from worker import Worker, WorkerDied

SUITE = "gpu"
SPARE = 3.0  # seconds kept for writing and printing
FIRST = 7  # kernel rows before the first recommendation: one of every kernel
INTERPRETED = {"TRITON_INTERPRET": "1", "R2EC_IMPL": "triton"}
FATAL = ("CUDA error", "HIP error", "AcceleratorError", "device-side assert", "illegal memory")


class Record:
    """Rows done so far, in a file that is always whole.

    Raises ValueError where the file belongs to another machine or commit.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        self.path, self.identity = path, identity
        self.done: dict[str, list[Row]] = {}
        if not path.exists():
            return
        stored = json.loads(path.read_text())
        for name, value in identity.items():
            if stored["identity"].get(name) != value:
                raise ValueError(
                    f"{path}: its rows are of {name} {stored['identity'].get(name)!r}, this run is "
                    f"of {value!r}; give --resume another file"
                )
        self.done = {key: [Row(**row) for row in rows] for key, rows in stored["rows"].items()}

    def add(self, key: str, rows: Sequence[Row], machine: dict[str, object] | None = None) -> None:
        """Keep the rows of ``key`` and write the file: a temporary one, renamed."""
        self.done[key] = list(rows)
        content = {
            "identity": self.identity,
            "machine": machine or {},
            "rows": {k: [row.as_dict() for row in v] for k, v in self.done.items()},
        }
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, self.path)

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.done.values() for row in rows]


def entries(options: Options) -> list[Entry]:
    """The rows in the order of their value; on a CPU the kernels' alone, tiny."""
    if options.device == "cpu":
        tiny = all_entries(["kernels"], dataclasses.replace(options, tiny=True))
        return [dataclasses.replace(entry, methods=("triton",)) for entry in tiny]
    kernels = all_entries(["kernels"], options)
    recommend = all_entries(["end_to_end"], options)
    rest = all_entries(["losses", "item_head", "scale", "rollout"], options)
    return [*kernels[:FIRST], *recommend, *kernels[FIRST:], *rest]


def run(
    options: Options,
    arguments: Sequence[str],
    *,
    started: float,
    budget: float,
    path: Path,
    say: Callable[[str], None],
) -> list[Row]:
    """Go on until everything is done or ``budget`` seconds are over; the rows done so far.

    ``started``: of `time.monotonic`, when the budget began. ``arguments``: the command line a
    worker process is started with. ``say`` prints a line.
    """
    deadline = started + budget - SPARE
    header = describe(options.device, rates=False)
    interpreted = options.device == "cpu"
    identity = {name: getattr(header, name) for name in ("name", "device", "versions", "commit")}
    record = Record(path, identity)
    wanted = entries(options)
    say(f"{header.name}: {len(record.done)} steps done before, {budget:.0f} s")
    if interpreted:
        say("no GPU: kernels run in Triton's interpreter in a tiny size; no timing")
    for name, step in (("build extension", _build), ("tests marked gpu", _tests)):
        if name not in record.done and time.monotonic() < deadline:
            row = step(name, options.device, deadline)
            if row is not None:
                say(f"{name}: {row.status} {row.note}")
                record.add(name, [row])
    todo = [entry.key for entry in wanted if entry.key not in record.done]
    for key, rows, machine in _measured(todo, arguments, deadline, interpreted, say):
        for row in rows:
            say(f"{row.key}: {row.status} {row.note} {_milliseconds(row)}")
        record.add(key, rows, machine)
    left = sum(entry.key not in record.done for entry in wanted)
    say(f"{len(wanted) - left} of {len(wanted)} entries done" + (", run again" if left else ""))
    return record.rows


def _milliseconds(row: Row) -> str:
    return "" if row.median_ms is None else f"{row.median_ms:.3f} ms"


def _measured(
    keys: Sequence[str],
    arguments: Sequence[str],
    deadline: float,
    interpreted: bool,
    say: Callable,
) -> Iterator[tuple[str, list[Row], dict[str, object]]]:
    """(key, rows, machine) of each key that ends in time; a dead worker is replaced."""
    script = str(Path(__file__).with_name("latency.py"))
    command = [sys.executable, script, "--serve", *arguments]
    environment = INTERPRETED if interpreted else {}
    worker: Worker | None = None
    try:
        for key in keys:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            try:
                if worker is None:
                    worker = Worker(command, environment, left)
                    say(" | ".join(worker.machine.lines()))
                left = deadline - time.monotonic()
                answer = worker.ask({"measure": key, "within": max(1.0, left - 5)}, left)
                rows = [Row(**row) for row in answer["rows"]]
            except TimeoutError:
                return  # not done: the next call starts with it
            except WorkerDied as error:
                machine = {} if worker is None else worker.machine.as_dict()
                worker = None
                parts = key.split(" | ")
                note = f"its process ended: {error}"
                yield key, [Row(parts[0], parts[1], {}, parts[-1], "failed", note)], machine
                continue
            if any(row.note.startswith("budget") for row in rows):
                return
            yield key, rows, worker.machine.as_dict()
            if any(word in row.note for row in rows for word in FATAL):
                worker.stop()  # the context of a GPU does not survive these
                worker = None
    finally:
        if worker is not None:
            worker.stop()


def _build(name: str, device: str, deadline: float) -> Row | None:
    """The extension, in place; None: no time."""
    row = Row(SUITE, name, {}, "setup.py build_ext")
    if importlib.util.find_spec("r2ec_fast._packing") is not None:
        row.note = "already built"
        return row
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return _command(row, command, deadline)


def _tests(name: str, device: str, deadline: float) -> Row | None:
    row = Row(SUITE, name, {}, "pytest")
    if device != "cuda":
        row.status, row.note = "skipped", "needs a GPU"
        return row
    if importlib.util.find_spec("pytest") is None:
        row.status, row.note = "not installed", "pytest"
        return row
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    return _command(row, command, deadline)


def _command(row: Row, command: Sequence[str], deadline: float) -> Row | None:
    left = max(1.0, deadline - time.monotonic())
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    row.status = "ok" if done.returncode == 0 else "failed"
    row.note = lines[-1][:160] if lines else ""
    return row

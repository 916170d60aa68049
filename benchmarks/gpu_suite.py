"""``--suite gpu --budget SECONDS --resume FILE``: the first minutes on a borrowed GPU.

Nothing is built or downloaded; torch, triton and numpy suffice, transformers for the decode rows.
This process only keeps order and needs no torch. Rows run in a worker, one entry after the other in
the order of the sections (``sections.py``), each section within its share of the time; what is left
goes to the rows that were passed over. A row that ends its worker, by an error of the GPU or by no
answer, is a failed row, and the next worker goes on with the other methods of its entry. Rows are
in FILE as soon as they are known; the next call does those that are not.

``--rehearse`` runs the same on a CPU in toy sizes, the kernels in Triton's interpreter: order,
files, gates and the time around the GPU's own, no measurement.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from record import Record
from rows import Row, compare, say_bad
from sections import SECTIONS
from worker import Offer, Worker, WorkerDied

SPARE = 3.0  # seconds kept for writing and printing
TIME = "the time is over"
PATIENCE = 30.0  # seconds that an entry may take before its worker is ended
REHEARSAL = {"TRITON_INTERPRET": "1", "R2EC_IMPL": "triton"}


class Over(Exception):
    """The call ends here; the message says why."""


class Suite:
    """One call of the suite.

    Args:
        command: what starts a worker.
        environment: variables added for it.
        path: the file of the rows.
        started, budget: `time.monotonic` when the budget began, and its seconds.
        say: prints a line.

    Attributes:
        starts: workers started. spent: seconds by what they went into.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        path: Path,
        *,
        started: float,
        budget: float,
        say: Callable[[str], None],
    ) -> None:
        self.command, self.environment, self.path = list(command), environment, path
        self.started, self.budget = started, budget
        self.deadline = started + budget - SPARE
        self._say = say
        self.worker: Worker | None = None
        self.record: Record | None = None
        self.offers: list[Offer] = []
        self.starts, self.spent = 0, dict.fromkeys(("start", "inputs", "checks", "repeats"), 0.0)

    def run(self) -> list[Row]:
        """All rows in order: done, failed, or "not reached".

        Raises:
            Over: no worker started. ValueError: the file is another's.
        """
        try:
            self._open()
            try:
                self._within_shares()
                for offer in self.offers:  # what the shares left out
                    self._entry(offer)
            except Over as end:
                self.say(str(end))
        finally:
            self._stop()
            if self.record is not None:
                self.record.close()
        return [row for offer in self.offers for row in self._rows(offer)]

    def _open(self) -> None:
        """The first worker says which rows there are, the file which of them are done."""
        self._start()
        machine, self.offers = self.worker.machine, self.worker.offers
        self.say(" | ".join(machine.lines()))
        names = ("name", "device", "versions", "commit")
        self.record = Record(self.path, {name: getattr(machine, name) for name in names})
        count = sum(len(offer.methods) for offer in self.offers)
        left = sum(len(self._missing(offer)) for offer in self.offers)
        self.say(f"{count - left} of {count} rows done before, {self.budget:.0f} s")

    def _rows(self, offer: Offer) -> list[Row]:
        """Of an entry, with their ratios: they may come from several calls."""
        rows = [
            self.record.done.get(f"{offer.key} | {method}") or offer.row(method, "not reached")
            for method in offer.methods
        ]
        compare(rows, offer.versus)
        return rows

    def _missing(self, offer: Offer) -> list[str]:
        return [m for m in offer.methods if f"{offer.key} | {m}" not in self.record.done]

    def say(self, line: str) -> None:
        self._say(f"[{time.monotonic() - self.started:6.1f}] {line}")

    def _within_shares(self) -> None:
        for section in SECTIONS:
            ends = time.monotonic() + section.share * self.budget
            for offer in self.offers:
                if offer.section == section.name and time.monotonic() < ends:
                    self._entry(offer)

    def _entry(self, offer: Offer) -> None:
        """The rows of an entry that are not done; each failure costs one method."""
        while missing := self._missing(offer):
            if self.worker is None:
                self._start()
            patience = min(self._left(), PATIENCE)
            try:
                rows = self._ask(offer, missing, patience)
            except TimeoutError as error:
                if patience < PATIENCE:
                    raise Over(TIME) from error  # the next call begins with it
                rows = self._failed(offer, missing, str(error))
            except WorkerDied as error:
                rows = self._failed(offer, missing, f"its process ended: {error}")
            if not rows and patience < PATIENCE:
                raise Over(TIME)
            late = f"not done within {patience:.0f} s"
            rows = rows or [offer.row(method, "failed", late) for method in missing]
            self.record.add(rows)
            for row in rows:
                self.say(f"{offer.section}: {_line(row)}")

    def _left(self) -> float:
        """Seconds; raises `Over` where there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Over(TIME)
        return left

    def _ask(self, offer: Offer, methods: list[str], patience: float) -> list[Row]:
        """The rows of ``methods``, without those that the time was too short for."""
        # the worker stops by itself a little before it would be ended
        question = {"measure": offer.key, "methods": methods, "within": patience - 1}
        answer = self.worker.ask(question, patience)
        for name, seconds in answer["spent"].items():
            self.spent[name] += seconds
        rows = [Row(**row) for row in answer["rows"]]
        return [row for row in rows if not row.note.startswith("budget")]

    def _failed(self, offer: Offer, missing: list[str], why: str) -> list[Row]:
        """The method that was running; all of them where none had begun."""
        guilty = [method for method in missing if method == self.worker.begun]
        self._stop()
        return [offer.row(method, "failed", why) for method in guilty or missing]

    def _start(self) -> None:
        began = time.monotonic()
        try:
            self.worker = Worker(self.command, self.environment, self._left())
        except TimeoutError as error:
            raise Over(TIME) from error
        except WorkerDied as error:
            raise Over(f"no worker starts: {error}") from error
        took = time.monotonic() - began
        self.spent["start"] += took
        self.starts += 1
        parts = ", ".join(f"{name} {s:.1f} s" for name, s in self.worker.spent.items())
        self.say(f"a worker started in {took:.1f} s ({parts})")

    def _stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
            self.worker = None


def command(chosen, arguments: Sequence[str], started: float) -> int:
    """What the command line does; the exit status. ``arguments``: those of a worker.

    0: every row is done and right; 1: some are wrong or failed; 3: some were not reached.
    """
    from table import LEGEND, render

    path = chosen.resume or Path("rehearsal.jsonl" if chosen.rehearse else "gpu-rows.jsonl")
    script = str(Path(__file__).with_name("latency.py"))
    try:
        suite = Suite(
            [sys.executable, script, "--serve", *arguments],
            REHEARSAL if chosen.rehearse else {},
            path,
            started=started,
            budget=chosen.budget,
            say=lambda line: print(line, flush=True),
        )
        rows = suite.run()
    except ValueError as error:
        raise SystemExit(f"--resume: {error}") from error
    except Over as end:
        raise SystemExit(f"--suite gpu: {end}") from end
    reached = [row for row in rows if row.status != "not reached"]
    if reached:
        print(LEGEND)
        print(render(reached))
    if chosen.rehearse:
        print("a rehearsal on a CPU in toy sizes: nothing was measured")
    print(_times(suite))
    return verdict(rows)


def verdict(rows: Sequence[Row]) -> int:
    """Print how many rows are done, and which are not; the exit status."""
    left = [row for row in rows if row.status == "not reached"]
    for row in left:
        print(f"not reached: {row.key}")
    bad = say_bad(rows)
    counts = Counter(row.status for row in rows)
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{len(rows)} rows: {said}" + ("; run again to go on" if left else ""))
    return 1 if bad else 3 if left else 0


def _line(row: Row) -> str:
    parts = [row.op, " ".join(f"{k}={v}" for k, v in row.shape.items()), row.method, row.status]
    parts += ["" if row.median_ms is None else f"{row.median_ms:.3f} ms", row.note]
    return " ".join(part for part in parts if part)


def _times(suite: Suite) -> str:
    """Where the seconds went."""
    total, spent = time.monotonic() - suite.started, suite.spent
    parts = [f"{suite.starts} worker starts {spent['start']:.1f}", f"inputs {spent['inputs']:.1f}"]
    parts += [f"first runs and checks {spent['checks']:.1f}", f"repeats {spent['repeats']:.1f}"]
    parts += [f"all else {total - sum(spent.values()):.1f}"]
    return f"{total:.1f} s in all: " + ", ".join(parts)

"""``--base REF``: this checkout against another commit of the project, in turns, ratios per row.

The commit is checked out as a git worktree. Both sides run THIS benchmark code, each on its own
library, so that a change of the benchmark is never taken for a change of speed.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from machine import ROOT
from rows import percentile
from table import time_text
from worker import Worker, WorkerDied

SLOWER = 1.10  # times the base's time
START = 300.0  # seconds a side may take to start, or to build and check an entry


@dataclass(frozen=True)
class Compared:
    """One method at one shape: milliseconds of both sides, run in turns."""

    key: str
    base_ms: tuple[float, ...] = ()
    ms: tuple[float, ...] = ()
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """Time here / time of the base, pair by pair."""
        return [new / old for new, old in zip(self.ms, self.base_ms, strict=True)]

    @property
    def verdict(self) -> str:
        """ "slower" or "faster" by more than 10% (in the median, and by more than 5% in at least
        four pairs of five), else "same"; "failed" where a side has no time."""
        if not self.ms:
            return "failed"
        ratios = self.ratios
        ratio = statistics.median(ratios)
        if ratio > SLOWER and percentile(ratios, 0.2) > 1.05:
            return "slower"
        if ratio < 1 / SLOWER and percentile(ratios, 0.8) < 1 / 1.05:
            return "faster"
        return "same"


def render(rows: Sequence[Compared], base: str) -> str:
    """The table of a comparison."""
    width = max((len(row.key) for row in rows), default=0)
    lines = [f"{'row'.ljust(width)}  {base} ms -> this checkout ms | ratio [p20-p80]"]
    for row in rows:
        if row.verdict == "failed":
            lines.append(f"{row.key.ljust(width)}  failed: {row.note}")
            continue
        ratios = row.ratios
        lines.append(
            f"{row.key.ljust(width)}  {time_text(statistics.median(row.base_ms))} -> "
            f"{time_text(statistics.median(row.ms))} | {statistics.median(ratios):.2f} "
            f"[{percentile(ratios, 0.2):.2f}-{percentile(ratios, 0.8):.2f}] {row.verdict}"
        )
    return "\n".join(lines)


@contextmanager
def worktree(ref: str, root: Path = ROOT) -> Iterator[Path]:
    """A checkout of ``ref`` in a temporary folder, with its C++ extension.

    Raises ValueError where git does not know the commit.
    """
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "base"
        git = ["git", "-C", str(root), "worktree"]
        done = subprocess.run(
            [*git, "add", "--detach", str(folder), ref], capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"base: git cannot check out {ref!r}: {done.stderr.strip()}")
        try:
            _give_extension(root, folder, ref)
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True)


def _give_extension(root: Path, folder: Path, ref: str) -> None:
    """The base's extension: this one where the sources are equal, else built; none if none here."""
    built = list((root / "r2ec_fast").glob("_packing*.so"))
    if not built:
        return
    sources = ["csrc", "setup.py"]
    command = ["git", "-C", str(root), "diff", "--quiet", ref, "--", *sources]
    if subprocess.run(command, capture_output=True).returncode == 0:
        for path in built:
            shutil.copy2(path, folder / "r2ec_fast")
        return
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)


def side(folder: Path, arguments: Sequence[str]) -> Worker:
    """A worker that runs the library of ``folder``. RuntimeError where it imports another one."""
    paths = f"{folder}:{folder / 'kernels'}"
    script = str(Path(__file__).with_name("latency.py"))
    command = [sys.executable, script, "--serve", *arguments]
    worker = Worker(command, {"PYTHONPATH": paths}, START)
    if not Path(worker.machine.source).is_relative_to(folder.resolve()):
        worker.stop()
        raise RuntimeError(
            f"expected the library of {folder}, got {worker.machine.source}; is PYTHONPATH ignored?"
        )
    return worker


def compare(
    base: Worker,
    here: Worker,
    keys: Sequence[str],
    *,
    repeats: int,
    seconds: float,
    deadline: float = float("inf"),
) -> Iterator[Compared]:
    """One `Compared` a row; sides take turns and change who goes first."""
    for key in keys:
        if time.monotonic() > deadline:
            yield Compared(key, note="budget: not run")
            continue
        try:
            opened = [worker.ask({"open": key}, START) for worker in (base, here)]
            yield from _timed(key, base, here, opened, repeats, seconds)
        except (WorkerDied, TimeoutError) as error:
            yield Compared(key, note=f"{type(error).__name__}: {error}")
            return


def _timed(
    key: str, base: Worker, here: Worker, opened: list[dict], repeats: int, seconds: float
) -> Iterator[Compared]:
    states = [{row["method"]: row for row in answer["rows"]} for answer in opened]
    for method in states[1]:
        name = f"{key} | {method}"
        problems = [
            f"{side} {row['status']}: {row['note']}"
            for side, row in (
                ("base", states[0].get(method, {"status": "failed", "note": "no such row"})),
                ("here", states[1][method]),
            )
            if row["status"] != "ok"
        ]
        if problems:
            yield Compared(name, note="; ".join(problems))
            continue
        first = max(answer["seconds"][method] for answer in opened)
        count = repeats or max(5, min(40, int(seconds / max(first, 1e-6))))
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(count):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            for which in order:
                answer = (base, here)[which].ask({"time": method}, START)
                times[which].append(answer["seconds"] * 1e3)
        yield Compared(name, tuple(times[0]), tuple(times[1]))


def write_json(path: Path, rows: Sequence[Compared], base: str) -> None:
    """All pairs of all rows."""
    found = [
        {"row": r.key, "base_ms": r.base_ms, "ms": r.ms, "note": r.note, "verdict": r.verdict}
        for r in rows
    ]
    path.write_text(json.dumps({"base": base, "rows": found}, indent=1) + "\n")

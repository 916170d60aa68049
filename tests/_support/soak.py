"""A soak: threads recommend while the item table is written and interrupts arrive.

    python tests/_support/soak.py --minutes 10

Rows of the table go back and forth between two versions, each change one write. Every answer must
be that of one of the two, bit for bit; the main thread is interrupted (SIGINT) all the time, in
searches, writes and passes over the model alike; memory must not grow. Exit status 1 where
something is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _support.toy import toy_dataset, toy_model  # noqa: E402

from r2ec_fast.serve.recommender import Recommender  # noqa: E402

THREADS = 4
WRITTEN = 7  # rows that change together
HANG_SECONDS = 60


class Soak:
    """One recommender, its two versions of the table, and the answers of both."""

    def __init__(self) -> None:
        data = toy_dataset()
        model = toy_model(dtype=torch.float32).eval()
        self.recommender = Recommender(model, data.data.catalog, data=data)
        self.index = model.index
        self.ids = torch.arange(WRITTEN) * 2
        first = self.index.items[self.ids].clone()
        self.versions = (first, first.flip(0).contiguous())
        self.jobs = [(f"u{user}", mode) for user in range(12) for mode in (False, True)]
        self.answers = []
        for rows in reversed(self.versions):
            self.index.write(self.ids, rows)
            self.answers.append({job: self.ask(job) for job in self.jobs})
        assert self.answers[0] != self.answers[1]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.last: dict[int, float] = {}  # thread -> when it last got an answer
        self.stop = threading.Event()

    def ask(self, job: tuple[str, bool]) -> tuple:
        user, reasoning = job
        [found] = self.recommender.recommend([user], 4, reasoning, max_completion_length=6)
        return tuple((r.item_id, r.score) for r in found), found.reasoning

    def recommend(self, rng: random.Random) -> None:
        job = rng.choice(self.jobs)
        found = self.ask(job)
        self.counts["answers"] += 1
        if not any(found == answers[job] for answers in self.answers):
            self.wrong.append(f"{job}: {found}")

    def write(self, rng: random.Random) -> None:
        self.index.write(self.ids, rng.choice(self.versions))
        self.counts["writes"] += 1

    def run_thread(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.stop.is_set():
            try:
                (self.write if seed == 0 else self.recommend)(rng)
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
            self.last[seed] = time.monotonic()

    def hung(self) -> list[int]:
        now = time.monotonic()
        return [seed for seed, when in self.last.items() if now - when > HANG_SECONDS]


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Interrupts:
    """SIGINT again and again; one raises KeyboardInterrupt where the work allows it."""

    def __init__(self) -> None:
        self.allowed = False
        self._ends = threading.Event()
        signal.signal(signal.SIGINT, self._handle)
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _handle(self, *_: object) -> None:
        if self.allowed:
            self.allowed = False
            raise KeyboardInterrupt

    def _send(self) -> None:
        rng = random.Random(1)
        while not self._ends.wait(rng.uniform(0.001, 0.05)):
            os.kill(os.getpid(), signal.SIGINT)

    def end(self) -> None:
        self._ends.set()
        self._thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    soak = Soak()
    threads = [
        threading.Thread(target=soak.run_thread, args=(seed,), daemon=True)
        for seed in range(THREADS + 1)
    ]
    for thread in threads:
        thread.start()
    rng = random.Random(chosen.seed)
    interrupts = Interrupts()
    memory = [resident_mib()]
    end = time.monotonic() + 60 * chosen.minutes
    next_look = 0.0
    while time.monotonic() < end and not soak.wrong and not soak.hung():
        try:
            interrupts.allowed = True
            rng.choice((soak.recommend, soak.write))(rng)
            interrupts.allowed = False
        except KeyboardInterrupt:
            soak.counts["interrupts"] += 1
        if time.monotonic() > next_look:
            memory.append(resident_mib())
            next_look = time.monotonic() + max(0.6 * chosen.minutes, 0.5)
    interrupts.end()
    hung = set(soak.hung())
    soak.stop.set()
    for seed, thread in enumerate(threads):
        thread.join(timeout=HANG_SECONDS)
        hung |= {seed} if thread.is_alive() else set()
    memory.append(resident_mib())
    settled = memory[len(memory) // 4]
    grown = memory[-1] - settled
    counts = ", ".join(f"{value:,} {name}" for name, value in sorted(soak.counts.items()))
    lines = [
        f"{counts}; resident {memory[0]:.0f} -> {settled:.0f} -> {memory[-1]:.0f} MiB",
        f"wrong answers or errors: {len(soak.wrong)}; threads that hang: {len(hung)}",
        *soak.wrong[:3],
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return int(bool(soak.wrong or hung or grown > 64))


if __name__ == "__main__":
    sys.exit(main())

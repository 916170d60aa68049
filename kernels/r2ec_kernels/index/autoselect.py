"""How a search is made: the fastest of the ways that the index's copies allow, measured.

CPUs differ by two orders of magnitude in what they do with bfloat16 and int8 (AMX, AVX512_BF16 and
VNNI multiply them; AVX2 has to widen), and the order changes with the batch. So the products are
timed once per process, width and batch class on rows of the index itself. What else a call does is
guessed, and in a small catalog it is as much as the product: of ways that are foreseen to be close,
the first calls decide (``Trials``). Results never depend on the choice: every way is exact.
"""

import threading
import time
from collections.abc import Callable, Hashable, Mapping

_SAMPLE_BYTES = 32 << 20  # of the widest candidate's rows: more than a core's cache
_REPEATS = 3
_FEW = 1024  # rows of a small sample: enough to outweigh what any call costs
_HOPELESS = 8.0  # times the best on a small sample: not tried on a large one
_CLOSE = 1.6  # times the best that was foreseen: tried in calls
_TURNS = 4  # of each way; the first does not count, its copy is not in a cache yet
_KINDS = 256  # of calls that are remembered at once

_timings: dict[tuple, dict[str, float]] = {}
_lock = threading.Lock()


class Trials:
    """Which of some ways of doing a call is fastest, by the first calls of its kind."""

    def __init__(self) -> None:
        self._fastest: dict[Hashable, str] = {}
        self._turns: dict[Hashable, dict[str, list[float]]] = {}
        self._changing = threading.Lock()

    def choose(self, kind: Hashable, foreseen: Callable[[], Mapping[str, float]]) -> str:
        """The way to take now. ``foreseen`` gives the seconds of each way, by name; it is asked
        at the first call of a kind."""
        fastest = self._fastest.get(kind)
        if fastest is not None:
            return fastest
        seconds = {} if kind in self._turns else foreseen()
        with self._changing:
            if kind not in self._turns:
                if len(self._turns) >= _KINDS:
                    self._turns.clear()
                    self._fastest.clear()
                limit = _CLOSE * min(seconds.values())
                close = [name for name in seconds if seconds[name] <= limit]
                close.sort(key=lambda name: seconds[name])
                self._turns[kind] = {name: [] for name in close}
                if len(close) == 1:
                    self._fastest[kind] = close[0]
            turns = self._turns[kind]
            return min(turns, key=lambda name: len(turns[name]))

    def took(self, kind: Hashable, name: str, seconds: float) -> None:
        """Remember what a call took that ``choose`` chose the way of."""
        if kind in self._fastest:
            return
        with self._changing:
            turns = self._turns.get(kind, {})
            if name in turns:
                turns[name].append(seconds)
            if turns and min(map(len, turns.values())) >= _TURNS:
                self._fastest[kind] = min(turns, key=lambda name: min(turns[name][1:]))


def batch_class(batch: int) -> int:
    """Batches that share a measurement: rounded up to a power of two."""
    return 1 << max(0, batch - 1).bit_length()


def seconds_per_row(
    key: tuple,
    runs: Mapping[str, Callable[[], Callable[[int], int]]],
    rows: int,
    row_bytes: int,
) -> Mapping[str, float]:
    """What a row costs each candidate, by name, without those that are far too slow.

    Args:
        key: what a measurement may be reused for.
        runs: by name, what makes a function that multiplies the first n rows or more with the
            batch and returns how many it took.
        rows: rows there are.
        row_bytes: bytes of the widest candidate's row.
    """
    if len(runs) == 1:
        return dict.fromkeys(runs, 0.0)
    with _lock:
        if key not in _timings:
            ready = {name: prepare() for name, prepare in runs.items()}
            _timings[key] = _measure(ready, rows, row_bytes)
        return _timings[key]


def _measure(runs: dict[str, Callable[[int], int]], rows: int, row_bytes: int) -> dict[str, float]:
    small = {name: _seconds_per_row(run, min(rows, _FEW)) for name, run in runs.items()}
    limit = _HOPELESS * min(small.values())
    sample = min(rows, _SAMPLE_BYTES // row_bytes)
    return {name: _seconds_per_row(runs[name], sample) for name in runs if small[name] <= limit}


def _seconds_per_row(run: Callable[[int], int], rows: int) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        done = run(rows)
        best = min(best, (time.perf_counter() - begin) / done)
    return best

"""Which product a coarse scan uses: the fastest of those that the index's copies allow, measured.

CPUs differ by two orders of magnitude in what they do with bfloat16 and int8 (AMX, AVX512_BF16 and
VNNI multiply them; AVX2 has to widen), and the order changes with the batch. So the candidates are
timed once per process, width and batch class on rows of the index itself. Results never depend on
the choice: every candidate comes with its error bound.
"""

import threading
import time
from collections.abc import Callable, Mapping

_SAMPLE_BYTES = 32 << 20  # of the widest candidate's rows: more than a core's cache
_REPEATS = 3
_FEW = 1024  # rows of a small sample: enough to outweigh what any call costs
_HOPELESS = 8.0  # times the best on a small sample: not tried on a large one

_timings: dict[tuple, dict[str, float]] = {}
_lock = threading.Lock()


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

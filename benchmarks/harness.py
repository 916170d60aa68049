"""One way to measure: the gate first, interleaved repeats, one row format.

A suite is a list of `Entry`: one operation at one shape. Building it gives its `Case`s, one a
method. `measure` runs every case once, checks the result, and only then times it, in turns with
the others. A wrong result, a failure, a missing peer and a spent budget are rows too.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import sections
import torch
from machine import (
    Timer,
    compute_dtype,
    graphed,
    matmul_rate,
    synchronize,
    torch_peak_mib,
    with_peak,
)
from rows import Machine, Row, compare, percentile

SETTLED = 5.0  # seconds: the first run of a longer case counts as a repeat
PROBE_EVERY = 2.0  # seconds between two looks at the machine's matmul rate
SHARE = 1 / 3  # of the time left, that one call may be foreseen to take: rows after it want theirs
AGAIN = 2.0  # seconds: the peak of a shorter case is that of a second run
COMPILED = 15.0  # the same on a GPU, where a first run compiles its kernels


class Wrong(Exception):
    """A method's result is not what it should be; the message says by how much."""


class Unavailable(RuntimeError):
    """A method that cannot run here; the message says why."""


class Stages:
    """A stopwatch for the parts of a call: ``with stages("head"): ...``."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str) -> "_Lap":
        return _Lap(self, name)

    def clear(self) -> None:
        self.seconds.clear()

    def medians_ms(self) -> dict[str, float]:
        return {name: statistics.median(laps) * 1e3 for name, laps in self.seconds.items()}


class _Lap:
    def __init__(self, stages: Stages, name: str) -> None:
        self.stages, self.name, self.less = stages, name, 0.0

    def __enter__(self) -> "_Lap":
        synchronize(self.stages.device)
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(self.stages.device)
        self.elapsed = time.perf_counter() - self.started
        self.stages.seconds.setdefault(self.name, []).append(self.elapsed - self.less)


@dataclass
class Case:
    """One method at one shape.

    ``check`` gets a call's result, returns its relative error (or None) and raises `Wrong`.
    ``moved``, ``flops``: bytes and operations one call needs at least. ``work``: how many ``unit``s
    one call serves. ``own_memory``: everything is allocated through torch, so count that exactly.
    ``cost``: (name of a family, size) of calls whose time grows with the size, to foresee a call
    that will not fit the budget. ``prepare``: makes what a server makes once, before the first run.
    ``remark``: what the row says of its calls, asked after the last one. ``timed`` False: the gate
    is all there is.
    """

    method: str
    run: Callable[[], object]
    check: Callable[[object], float | None]
    moved: float | None = None
    flops: float | None = None
    work: float | None = None
    unit: str = ""
    stages: Stages | None = None
    own_memory: bool = False
    cost: tuple[str, float] | None = None
    prepare: Callable[[], object] = lambda: None
    remark: Callable[[], str] = lambda: ""
    timed: bool = True


@dataclass(frozen=True)
class Entry:
    """One operation at one shape. ``build`` makes its cases; ``versus``: the peer of the ratios;
    ``section``: where it stands in the first minutes on a GPU (``sections.py``)."""

    suite: str
    op: str
    shape: dict[str, int | float | str]
    methods: tuple[str, ...]
    build: Callable[[], Sequence[Case]]
    versus: str = ""
    section: str = sections.REST

    @property
    def key(self) -> str:
        return self.row("").key.removesuffix(" | ")

    def row(self, method: str, **fields: object) -> Row:
        return Row(self.suite, self.op, self.shape, method, **fields)


@dataclass(frozen=True)
class Settings:
    """How long to measure. ``repeats`` 0: by time, about ``seconds`` a case. ``deadline``: of
    `time.monotonic`. ``untimed``: gates only, and the status that such rows get ("interpreted").
    ``costs``: seconds per unit of size of each family of calls, as measured so far. ``spent``:
    seconds that went into inputs, checks (with first runs) and repeats. ``say`` gets a line a case,
    ``begin`` a method before each of its runs; ``fatal``: errors to raise, not to make a row of.
    """

    device: str = "cpu"
    repeats: int = 0
    seconds: float = 1.5
    deadline: float = float("inf")
    graph: bool = False
    untimed: str = ""
    costs: dict[str, float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    say: Callable[[str], object] = lambda line: None
    begin: Callable[[str], object] = lambda method: None
    fatal: Callable[[Exception], bool] = lambda error: False

    @contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """Adds what the block takes to ``spent``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - started


def rotating(function: Callable[[object], object], inputs: Sequence[object]) -> Callable:
    """A call that takes the next input each time, the first one first: no input stays in a cache
    from the call before."""
    turn = -1

    def run() -> object:
        nonlocal turn
        turn += 1
        return function(inputs[turn % len(inputs)])

    return run


def open_entry(entry: Entry, settings: Settings) -> tuple[list[Case], list[Row], list[float]]:
    """Build an entry and pass each case through the gate.

    Returns the cases that may be timed, all rows (in the order of the methods), and the seconds of
    the first run of each returned case.
    """
    rows = {method: entry.row(method) for method in entry.methods}
    alive, first = [], []
    try:
        with settings.spending("inputs"):
            cases = entry.build()
    except Exception as error:  # whatever happens to one entry, the table goes on
        if settings.fatal(error):
            raise
        for row in rows.values():
            row.status, row.note = _failure(error)
        return [], list(rows.values()), []
    with settings.spending("checks"):
        for case in cases:
            if case.method not in rows:
                continue
            seconds = _pass_gate(case, rows[case.method], settings)
            if seconds is not None:
                alive.append(case)
                first.append(seconds)
    return alive, list(rows.values()), first


def _pass_gate(case: Case, row: Row, settings: Settings) -> float | None:
    """Seconds of a first run whose result is right; None, and why in ``row``, where it is not."""
    foreseen, left = _foresee(case, settings), settings.deadline - time.monotonic()
    if left <= 0 or foreseen > left * SHARE:
        need = f"up to {foreseen:.0f} s a call" if foreseen else "no time left"
        row.status, row.note = "skipped", f"budget: {need}"
        return None
    try:
        settings.begin(case.method)
        case.prepare()
        result, seconds, row.peak_mib = with_peak(case.run, settings.device)
        row.error = case.check(result)
        del result
        if case.timed and not settings.untimed:
            seconds = _second_run(case, row, seconds, settings.device)
        if settings.graph and settings.device == "cuda":
            case.run = graphed(case.run)
    except Exception as error:
        if settings.fatal(error):
            raise
        row.status, row.note = _failure(error)
        settings.say(f"{row.key}: {row.status} {row.note}")
        _recover(settings.device)
        return None
    settings.say(f"{row.key}: checked, first run {seconds * 1e3:.1f} ms")
    if case.cost:
        settings.costs[case.cost[0]] = seconds / case.cost[1]
    return seconds


def _second_run(case: Case, row: Row, seconds: float, device: str) -> float:
    """The peak of a run that imports and compiles nothing any more, and the faster run's seconds;
    a long case on a CPU has its first run's."""
    if case.own_memory and device == "cpu":
        row.peak_mib = torch_peak_mib(case.run)
    elif seconds < (COMPILED if device == "cuda" else AGAIN):
        _, again, row.peak_mib = with_peak(case.run, device)
        seconds = min(seconds, again)
    return seconds


def measure(entry: Entry, settings: Settings, machine: Machine | None = None) -> list[Row]:
    """One row a method of ``entry``."""
    cases, rows, first = open_entry(entry, settings)
    by_method = {row.method: row for row in rows}
    timed: list[tuple[Case, float]] = []
    for case, seconds in zip(cases, first, strict=True):
        if case.timed and not settings.untimed:
            timed.append((case, seconds))
            continue
        row = by_method[case.method]
        row.status, row.peak_mib = settings.untimed or "ok", None
        row.note = "; ".join(filter(None, ["checked, no timing", _remark(case, settings)]))
    if timed:
        _time(timed, by_method, settings, machine)
    compare(rows, entry.versus)
    cases.clear()
    timed.clear()
    _recover(settings.device)
    return rows


def _time(
    timed: Sequence[tuple[Case, float]],
    rows: Mapping[str, Row],
    settings: Settings,
    machine: Machine | None,
) -> None:
    """Run the cases in turns and write what came out into their rows. ``timed``: each case and the
    seconds of its first run."""
    cases, first = zip(*timed, strict=True)
    with settings.spending("repeats"):
        samples, rate = _interleave(cases, first, settings)
    for case, times in zip(cases, samples, strict=True):
        row = rows[case.method]
        if times:
            fill(row, case, times, machine)
            row.note = _remark(case, settings)
            if machine is not None:
                row.rate = rate / 1e12 / machine.matmul_tflop_s
        else:
            row.status, row.note = "skipped", "budget: no time left after the gate"


def _remark(case: Case, settings: Settings) -> str:
    """What the case says of its calls, or why it cannot; its time is right all the same."""
    settings.begin(case.method)
    try:
        with settings.spending("checks"):
            return case.remark()
    except Exception as error:
        if settings.fatal(error):
            raise
        return " ".join(_failure(error))


def fill(row: Row, case: Case, times: Sequence[float], machine: Machine | None) -> None:
    """Write the statistics of ``times`` (seconds) into ``row``."""
    row.n = len(times)
    row.median_ms = statistics.median(times) * 1e3
    row.p20_ms, row.p80_ms, row.p90_ms, row.p99_ms = (
        percentile(times, share) * 1e3 for share in (0.2, 0.8, 0.9, 0.99)
    )
    if case.work:
        row.per_s, row.unit = case.work / row.median_ms * 1e3, case.unit
    if case.moved:
        row.gb_s = case.moved / row.median_ms / 1e6
    if case.flops:
        row.tflop_s = case.flops / row.median_ms / 1e9
    if machine is not None:
        row.of_copy = row.gb_s and row.gb_s / machine.copy_gb_s
        row.of_matmul = row.tflop_s and row.tflop_s / machine.matmul_tflop_s
    if case.stages is not None:
        row.stages = case.stages.medians_ms()


def not_run(entry: Entry, why: str) -> list[Row]:
    """The rows of an entry that was left out."""
    return [entry.row(method, status="skipped", note=why) for method in entry.methods]


def relative_error(value: torch.Tensor, right: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``right``."""
    right = right.double()
    return float((value.double() - right).norm() / right.norm().clamp(min=1e-300))


def require(error: float, limit: float, what: str) -> float:
    """``error`` where it is within ``limit``; raises `Wrong` otherwise, for NaN too."""
    if not error <= limit:
        raise Wrong(f"{what}: error {error:.2g}, allowed {limit:.2g}")
    return error


def _repeats(first: float, settings: Settings) -> int:
    if settings.repeats:
        return settings.repeats
    least = 3 if first < 15 else 2
    return max(least, min(100, int(settings.seconds / max(first, 1e-6))))


def _interleave(
    cases: Sequence[Case], first: Sequence[float], settings: Settings
) -> tuple[list[list[float]], float]:
    """Seconds of each case's repeats, and the machine's matmul rate between them (FLOP a second).

    Cases take turns, the rarer ones spread over all rounds.
    """
    timer = Timer(settings.device)
    dtype = compute_dtype(settings.device)
    rates, probed = [matmul_rate(settings.device, dtype)], time.monotonic()
    samples: list[list[float]] = [[] for _ in cases]
    wanted = [_repeats(seconds, settings) for seconds in first]
    for case, seconds, taken in zip(cases, first, samples, strict=True):
        if seconds > SETTLED:
            taken.append(seconds)
        elif case.stages is not None:
            case.stages.clear()
    rounds = max(wanted, default=0)
    for turn in range(rounds):
        for case, count, seconds, taken in zip(cases, wanted, first, samples, strict=True):
            due = (turn + 1) * count // rounds
            if len(taken) < due and time.monotonic() + seconds < settings.deadline:
                settings.begin(case.method)
                taken.append(timer(case.run))
        if time.monotonic() - probed > PROBE_EVERY:
            rates.append(matmul_rate(settings.device, dtype))
            probed = time.monotonic()
    return samples, statistics.median(rates)


def _foresee(case: Case, settings: Settings) -> float:
    if case.cost is None:
        return 0.0
    family, size = case.cost
    return settings.costs.get(family, 0.0) * size


def _failure(error: Exception) -> tuple[str, str]:
    """(status, note) of a row whose method raised."""
    text = " ".join(str(error).split())[:160]
    if isinstance(error, Wrong):
        return "WRONG", text
    if isinstance(error, Unavailable):
        return "skipped", text
    if isinstance(error, ModuleNotFoundError):
        return "not installed", text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "failed", "out of memory"
    return "failed", f"{type(error).__name__}: {text}"


def _recover(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def stopped_by(settings: Settings, seconds: float) -> Settings:
    """The same settings with a deadline ``seconds`` from now at the latest."""
    return replace(settings, deadline=min(settings.deadline, time.monotonic() + seconds))

"""One way to measure: the gate first, interleaved repeats, one row format.

A suite is a list of `Entry`: one operation at one shape. Building it gives its `Case`s, one a
method. `measure` runs every case once, checks the result, and only then times it, in turns with
the others. A wrong result, a failure, a missing peer and a spent budget are rows too.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from machine import (
    Machine,
    Timer,
    compute_dtype,
    graphed,
    matmul_rate,
    synchronize,
    torch_peak_mib,
    with_peak,
)

NOISY = 0.10  # of the median (p20 to p80), of the machine's matmul rate
SETTLED = 5.0  # seconds: the first run of a longer case counts as a repeat
PROBE_EVERY = 2.0  # seconds between two looks at the machine's matmul rate
SHARE = 1 / 3  # of the time left, that one call may be foreseen to take: rows after it want theirs
AGAIN = 2.0  # seconds: the peak of a shorter case is that of a second run


class Wrong(Exception):
    """A method's result is not what it should be; the message says by how much."""


class Unavailable(Exception):
    """A method that cannot run here; the message says why."""


@dataclass
class Row:
    """What is known of one method at one shape. Times in ms; None = not measured.

    ``status``: "ok", "WRONG", "failed", "not installed", "skipped" or "interpreted"; every other
    than "ok" comes without a time. ``per_s``: ``unit`` a second. ``of_copy``, ``of_matmul``: share
    of the machine's measured copy bandwidth and matmul rate. ``error``: of the result, relative.
    ``ratio``: time of ``versus`` / time of this method. ``rate``: the machine's matmul rate while
    the row ran, as a share of that in the header.
    """

    suite: str
    op: str
    shape: dict[str, int | float | str]
    method: str
    status: str = "ok"
    note: str = ""
    n: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    per_s: float | None = None
    unit: str = ""
    gb_s: float | None = None
    tflop_s: float | None = None
    of_copy: float | None = None
    of_matmul: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    versus: str = ""
    ratio: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    rate: float | None = None

    @property
    def key(self) -> str:
        shape = " ".join(f"{name}={value}" for name, value in self.shape.items())
        return f"{self.suite} | {self.op} | {shape} | {self.method}"

    @property
    def noisy(self) -> bool:
        """Whether the repeats, or the machine under them, moved by more than a tenth."""
        if self.median_ms is None or self.n < 2:
            return False
        spread = self.p80_ms - self.p20_ms > NOISY * self.median_ms
        return spread or (self.rate is not None and abs(self.rate - 1) > NOISY)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


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


@dataclass(frozen=True)
class Entry:
    """One operation at one shape. ``build`` makes its cases; ``versus``: the peer of the ratios."""

    suite: str
    op: str
    shape: dict[str, int | float | str]
    methods: tuple[str, ...]
    build: Callable[[], Sequence[Case]]
    versus: str = ""

    @property
    def key(self) -> str:
        return f"{self.suite} | {self.op} | " + " ".join(f"{k}={v}" for k, v in self.shape.items())

    def row(self, method: str, **fields: object) -> Row:
        return Row(self.suite, self.op, self.shape, method, **fields)


@dataclass(frozen=True)
class Settings:
    """How long to measure. ``repeats`` 0: by time, about ``seconds`` a case. ``deadline``: of
    `time.monotonic`. ``timed`` False: gates only, for interpreted kernels. ``costs``: seconds per
    unit of size of each family of calls, as measured so far. ``say`` gets a line a case."""

    device: str = "cpu"
    repeats: int = 0
    seconds: float = 1.5
    deadline: float = float("inf")
    graph: bool = False
    timed: bool = True
    costs: dict[str, float] = field(default_factory=dict)
    say: Callable[[str], object] = lambda line: None


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
        cases = entry.build()
    except Exception as error:  # whatever happens to one entry, the table goes on
        for row in rows.values():
            row.status, row.note = _failure(error)
        return [], list(rows.values()), []
    for case in cases:
        if case.method not in rows:
            continue
        row = rows[case.method]
        foreseen, left = _foresee(case, settings), settings.deadline - time.monotonic()
        if left <= 0 or foreseen > left * SHARE:
            need = f"up to {foreseen:.0f} s a call" if foreseen else "no time left"
            row.status, row.note = "skipped", f"budget: {need}"
            continue
        try:
            case.prepare()
            result, seconds, row.peak_mib = with_peak(case.run, settings.device)
            row.error = case.check(result)
            del result
            if case.own_memory and settings.device == "cpu" and settings.timed:
                row.peak_mib = torch_peak_mib(case.run)
            elif seconds < AGAIN and settings.timed:  # a first call may import its library
                row.peak_mib = with_peak(case.run, settings.device)[2]
            if settings.graph and settings.device == "cuda":
                case.run = graphed(case.run)
        except Exception as error:
            row.status, row.note = _failure(error)
            settings.say(f"{row.key}: {row.status} {row.note}")
            _recover(settings.device)
            continue
        settings.say(f"{row.key}: checked, first run {seconds * 1e3:.1f} ms")
        if case.cost:
            settings.costs[case.cost[0]] = seconds / case.cost[1]
        alive.append(case)
        first.append(seconds)
    return alive, list(rows.values()), first


def measure(entry: Entry, settings: Settings, machine: Machine | None = None) -> list[Row]:
    """One row a method of ``entry``."""
    cases, rows, first = open_entry(entry, settings)
    by_method = {row.method: row for row in rows}
    if not settings.timed:
        for case in cases:
            row = by_method[case.method]
            row.status, row.note, row.peak_mib = "interpreted", "checked, no timing", None
        return rows
    samples, rate = _interleave(cases, first, settings)
    for case, times in zip(cases, samples, strict=True):
        row = by_method[case.method]
        if times:
            fill(row, case, times, machine)
            if machine is not None:
                row.rate = rate / 1e12 / machine.matmul_tflop_s
        else:
            row.status, row.note = "skipped", "budget: no time left after the gate"
    compare(rows, entry.versus)
    cases.clear()
    _recover(settings.device)
    return rows


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


def percentile(times: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest time that at least ``share`` of the times do not exceed."""
    ordered = sorted(times)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def compare(rows: Sequence[Row], versus: str) -> None:
    """Write how many times faster than ``versus`` each row is, where both have a time."""
    base = next((row for row in rows if row.method == versus), None)
    for row in rows:
        row.versus = versus
        if base is not None and base.median_ms and row.median_ms:
            row.ratio = base.median_ms / row.median_ms


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

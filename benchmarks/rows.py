"""What a benchmark says: a row a method and shape, and the machine above the table.

Plain data, without torch: what only reads rows starts at once.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

NOISY = 0.10  # of the median (p20 to p80), of the machine's matmul rate
BAD = ("WRONG", "failed")  # statuses that make the exit status 1


@dataclass(frozen=True)
class Machine:
    """What stands above every table. Rates are measured when it is made.

    ``copy_gb_s``: bytes read plus bytes written by a large copy. ``matmul_tflop_s``: of a square
    product in ``dtype``, the type the suites compute in here.
    """

    name: str
    device: str
    dtype: str
    threads: int
    versions: str
    commit: str
    source: str
    clocks: str
    copy_gb_s: float
    matmul_tflop_s: float

    def lines(self) -> list[str]:
        """The header, for printing."""
        return [
            f"{self.name} ({self.device}, {self.threads} threads) | {self.versions}",
            f"commit {self.commit}{self._rates()} | clocks {self.clocks}",
        ]

    def _rates(self) -> str:
        if math.isnan(self.copy_gb_s):  # not measured
            return ""
        product = f"{self.dtype} product {self.matmul_tflop_s:.3g} TFLOP/s"
        return f" | copy {self.copy_gb_s:.1f} GB/s | {product}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Row:
    """What is known of one method at one shape. Times in ms; None = not measured.

    ``status``: "ok", "WRONG", "failed", "not installed", "skipped", "interpreted", "rehearsed" or
    "not reached"; every other than "ok" comes without a time, and so does a check that is not
    timed. ``per_s``: ``unit`` a second. ``of_copy``, ``of_matmul``: share of the machine's measured
    copy bandwidth and matmul rate. ``error``: of the result, relative. ``ratio``: time of
    ``versus`` / time of this method. ``rate``: the machine's matmul rate while the row ran, as a
    share of that in the header.
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


def say_bad(rows: Sequence[Row]) -> bool:
    """Name the rows that are wrong or failed; whether there are some."""
    bad = [row for row in rows if row.status in BAD]
    for row in bad:
        print(f"{row.status}: {row.key}: {row.note}")
    return bool(bad)

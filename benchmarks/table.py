"""Rows as a table on the screen, as CSV, and as plots of time and memory against one size."""

import csv
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from rows import NOISY, Row

LEGEND = (
    "ms: median [p20-p80]; n repeats (p90, p99 by nearest rank: with few repeats the slowest); "
    "% of this machine's measured copy bandwidth and matmul rate; peak MiB above the inputs; "
    "x = time of the named peer / time of the row; noisy: p20-p80 wider than 10% of the median, "
    "or the machine's matmul rate more than 10% off the header's meanwhile"
)
SIZES = {
    "N": "N, items",
    "B": "B, users or queries",
    "V": "V, tokens of the vocabulary",
    "G": "G, reasonings a user",
    "T": "T, tokens",
    "R": "R, reasoning tokens",
    "rows": "rows",
}


def time_text(ms: float) -> str:
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:,.0f}"


def _share(value: float, share: float | None) -> str:
    text = f"{value:.3g}"
    return text if share is None else f"{text} ({100 * share:.0f}%)"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "op": lambda r: r.op,
    "shape": lambda r: " ".join(f"{k}={v}" for k, v in r.shape.items()),
    "method": lambda r: r.method,
    "ms": lambda r: (
        ""
        if r.median_ms is None
        else f"{time_text(r.median_ms)} [{time_text(r.p20_ms)}-{time_text(r.p80_ms)}]"
    ),
    "p90": lambda r: "" if r.p90_ms is None else time_text(r.p90_ms),
    "p99": lambda r: "" if r.p99_ms is None else time_text(r.p99_ms),
    "n": lambda r: str(r.n) if r.n else "",
    "a second": lambda r: "" if r.per_s is None else f"{r.per_s:.3g} {r.unit}",
    "GB/s": lambda r: "" if r.gb_s is None else _share(r.gb_s, r.of_copy),
    "TFLOP/s": lambda r: "" if r.tflop_s is None else _share(r.tflop_s, r.of_matmul),
    "peak MiB": lambda r: "" if r.peak_mib is None or r.status != "ok" else f"{r.peak_mib:.1f}",
    "error": lambda r: "" if r.error is None else f"{r.error:.1e}",
    "x": lambda r: "" if r.ratio is None else f"{r.ratio:.2f} vs {r.versus}",
    "remarks": lambda r: _remarks(r),
}
MACHINE_BOUND = ("ms", "p90", "p99", "n", "a second", "GB/s", "TFLOP/s", "peak MiB")


def render(rows: Sequence[Row], *, ratios_only: bool = False) -> str:
    """The table; empty columns are left out. ``ratios_only``: nothing that depends on how fast
    the machine is, for shared ones."""
    columns = {n: f for n, f in COLUMNS.items() if not (ratios_only and n in MACHINE_BOUND)}
    if ratios_only:
        rows = [replace(row, stages={}) for row in rows]
    cells = [{name: get(row) for name, get in columns.items()} for row in rows]
    shown = [name for name in columns if any(c[name] for c in cells)]
    widths = {n: max(len(n), *(len(c[n]) for c in cells)) for n in shown}
    widths["remarks"] = 0
    lines = ["  ".join(name.ljust(widths[name]) for name in shown)]
    lines += ["  ".join(c[name].ljust(widths[name]) for name in shown).rstrip() for c in cells]
    return "\n".join(lines)


def _remarks(row: Row) -> str:
    parts = [] if row.status == "ok" else [row.status]
    parts += ["noisy"] if row.noisy else []
    if row.rate is not None and abs(row.rate - 1) > NOISY:
        parts.append(f"machine at {row.rate:.2f} of its rate")
    parts += [row.note] if row.note else []
    parts += [" + ".join(f"{name} {time_text(ms)}" for name, ms in row.stages.items())]
    return ": ".join(parts[:2]) if row.status != "ok" else "; ".join(p for p in parts if p)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All fields of the rows; shape and stages as JSON. Written whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)] + ["noisy"])
        writer.writeheader()
        for row in rows:
            values = row.as_dict() | {"noisy": row.noisy}
            for name in ("shape", "stages"):
                values[name] = json.dumps(values[name])
            writer.writerow(values)
    os.replace(temporary, path)


def series(rows: Sequence[Row], size: str) -> dict[tuple, list[Row]]:
    """Timed rows that differ in ``size`` alone: (suite, op, other sizes, method) -> rows by size,
    where some method of the operation has at least three."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.median_ms is not None and isinstance(row.shape.get(size), int):
            others = tuple((k, v) for k, v in row.shape.items() if k != size)
            found.setdefault((row.suite, row.op, others, row.method), []).append(row)
    lines = {key[:3] for key, group in found.items() if len({r.shape[size] for r in group}) >= 3}
    return {
        key: sorted(group, key=lambda r: r.shape[size])
        for key, group in found.items()
        if key[:3] in lines
    }


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One PNG for each suite, operation, and size that varies: time above memory, on linear axes
    and on logarithmic ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for size, label in SIZES.items():
        groups: dict[tuple, dict[str, list[Row]]] = {}
        for (suite, op, others, method), group in series(rows, size).items():
            groups.setdefault((suite, op, others), {})[method] = group
        for (suite, op, others), methods in groups.items():
            figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex="col")
            for column, scale in enumerate(("linear", "log")):
                _panels(axes[0][column], axes[1][column], methods, size, scale)
                axes[1][column].set_xlabel(label)
            axes[0][0].legend(fontsize=8)
            fixed = " ".join(f"{k}={v}" for k, v in others)
            figure.suptitle(f"{op}   {fixed}", fontsize=11)
            figure.tight_layout()
            name = re.sub(r"[^A-Za-z0-9.=_]+", "-", "-".join([suite, op, size, fixed])).strip("-")
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=110)
            pyplot.close(figure)
    return written


def _panels(times, memory, methods: dict[str, list[Row]], size: str, scale: str) -> None:
    for method, group in methods.items():
        x = [r.shape[size] for r in group]
        [line] = times.plot(x, [r.median_ms for r in group], marker="o", ms=4, label=method)
        low, high = [r.p20_ms for r in group], [r.p80_ms for r in group]
        times.fill_between(x, low, high, alpha=0.2, color=line.get_color())
        held = [(r.shape[size], max(r.peak_mib, 0.01)) for r in group if r.peak_mib is not None]
        if held:
            memory.plot(*zip(*held, strict=True), marker="o", ms=4, color=line.get_color())
    times.set_ylabel(f"ms, median and p20-p80 ({scale})")
    memory.set_ylabel(f"peak MiB above the inputs ({scale})")
    for axes in (times, memory):
        axes.set_xscale(scale)
        axes.set_yscale(scale)
        axes.grid(alpha=0.3)

"""What a recommendation costs, end to end and kernel by kernel.

    python benchmarks/latency.py                                  # this machine, under 10 minutes
    python benchmarks/latency.py --model PATH --csv out.csv --plot plots
    python benchmarks/latency.py --list
    python benchmarks/latency.py --suite item_head,losses --op top-K
    python benchmarks/latency.py --suite packing --base HEAD~5    # two commits, in turns
    python benchmarks/latency.py --suite smoke                    # two minutes, ratios only
    python benchmarks/latency.py --suite gpu --budget 330 --resume gpu.jsonl
    python benchmarks/latency.py --suite gpu --rehearse           # the same on a CPU, no times

Every result is checked before a time is printed; a wrong or a failed row makes the exit status 1.
Without --model (or R2EC_TEST_MODEL) the language model has random weights in a published shape, and
the rows say so.
docs/guides/benchmarks.md explains the table.
"""

import argparse
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUDGET = 560.0  # seconds of a whole run
SECONDS = {"end_to_end": 12.0}  # of repeats a row; others 1.5
GPU_SECONDS = 0.3  # of repeats a row in the first minutes on a GPU


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", default="", help="names by commas, or gpu; default: by device")
    parser.add_argument("--op", default="", help="only entries whose line in --list contains this")
    parser.add_argument("--method", default="", help="only methods with one of these, by ;")
    parser.add_argument("--list", action="store_true", help="print the entries and stop")
    parser.add_argument("--model", default=os.environ.get("R2EC_TEST_MODEL"), help="model folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="", help="of models; default: by device"
    )
    parser.add_argument("--titles", type=Path, help="text file, a title a line; default: generated")
    parser.add_argument("--repeats", type=int, default=0, help="runs a row; 0: by time")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds (default 560)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's own")
    parser.add_argument("--graph", action="store_true", help="on a GPU: replay CUDA graphs")
    parser.add_argument("--base", help="commit to compare this checkout with")
    parser.add_argument("--csv", type=Path, help="file for all fields of all rows")
    parser.add_argument("--plot", type=Path, help="folder for time and memory against N, B, V, G")
    parser.add_argument("--resume", type=Path, help="file of --suite gpu (default gpu-rows.jsonl)")
    parser.add_argument("--rehearse", action="store_true", help="--suite gpu on a CPU, tiny")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.repeats < 0:
        parser.error(f"--repeats: expected at least 0, got {chosen.repeats}")
    if chosen.budget <= 0:
        parser.error(f"--budget: expected a positive number, got {chosen.budget}")
    if chosen.rehearse and chosen.suite != "gpu":
        parser.error("--rehearse: goes with --suite gpu")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    chosen = parse(arguments)
    _find_library()
    if chosen.suite == "gpu" and not chosen.serve and not chosen.list:
        import gpu_suite  # its worker needs torch, this process does not

        return gpu_suite.command(chosen, _worker_arguments(chosen, ["gpu"]), started)
    import torch
    from machine import pick_device
    from options import Options

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device = "cpu" if chosen.rehearse else pick_device()
    options = Options(device, chosen.model, chosen.titles, tiny=_interpreted(), dtype=chosen.dtype)
    names = chosen.suite.split(",") if chosen.suite else _defaults(device)
    entries = _filtered(
        _gpu_entries(chosen, options) if names == ["gpu"] else _entries(names, options), chosen
    )
    if chosen.list:
        for entry in entries:
            print(f"{entry.key}: {', '.join(entry.methods)}")
        return 0
    if chosen.serve:
        return _serve(chosen, device, entries, started)
    if chosen.base:
        return _base(chosen, names, entries, started)
    return _run(chosen, options, names, entries, started)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _entries(names: Sequence[str], options) -> list:
    from registry import all_entries, suites

    if unknown := [name for name in names if name not in suites()]:
        known = ", ".join([*suites(), "gpu"])
        sys.exit(f"--suite: expected some of {known}, got {unknown[0]!r}")
    return all_entries(names, options)


def _gpu_entries(chosen, options) -> list:
    """Those of a GPU, which another machine only lists; the rehearsal's are tiny."""
    import gpu_rows

    if chosen.rehearse:
        return gpu_rows.entries(dataclasses.replace(options, tiny=True))
    if not chosen.list and (options.device == "cpu" or _interpreted()):
        sys.exit("no GPU to measure here; --rehearse runs the same rows on a CPU in toy sizes")
    return gpu_rows.entries(dataclasses.replace(options, device="cuda", tiny=False))


def _find_library() -> None:
    """The library of this checkout, unless PYTHONPATH or an installation names another."""
    import importlib.util

    root = HERE.parent
    sys.path += [str(root), str(root / "kernels")]
    if importlib.util.find_spec("r2ec_kernels") is None:
        sys.exit(f"no r2ec_kernels in {root / 'kernels'}: run from a checkout")


def _filtered(entries, chosen) -> list:
    """The entries that --op names, with the methods that --method names; none is an error."""
    wanted = [part.strip() for part in chosen.method.split(";")]
    kept = []
    for entry in entries:
        methods = tuple(m for m in entry.methods if any(part in m for part in wanted))
        if chosen.op in entry.key and methods:
            kept.append(dataclasses.replace(entry, methods=methods))
    if not kept:
        sys.exit(
            f"--op, --method: no entry contains {chosen.op!r} and {chosen.method!r}; "
            "--list prints them"
        )
    return kept


def _defaults(device: str) -> list[str]:
    return ["end_to_end"] if device == "cpu" else ["end_to_end", "kernels", "item_head", "losses"]


def _settings(chosen: argparse.Namespace, device: str, seconds: float, deadline: float):
    from harness import Settings

    def say(line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    untimed = "rehearsed" if chosen.rehearse else "interpreted" if _interpreted() else ""
    return Settings(device, chosen.repeats, seconds, deadline, chosen.graph, untimed, say=say)


def _run(chosen, options, names, entries, started: float) -> int:
    from harness import measure, not_run
    from machine import describe
    from registry import describe_end_to_end
    from rows import say_bad
    from table import LEGEND, plot, render, write_csv

    machine = describe(options.device)
    smoke = names == ["smoke"]
    print("\n".join(machine.lines()))
    if "end_to_end" in names:
        print(describe_end_to_end(options))
    print(LEGEND, flush=True)
    deadline = started + chosen.budget
    costs: dict[str, float] = {}
    rows = []
    for entry in entries:
        seconds = 0.3 if smoke else SECONDS.get(entry.suite, 1.5)
        settings = _settings(chosen, options.device, seconds, deadline)
        settings.costs.update(costs)
        if time.monotonic() > deadline:
            new = not_run(entry, "budget: not run")
        else:
            new = measure(entry, settings, machine)
        costs = settings.costs
        rows += new
        if chosen.csv:
            write_csv(chosen.csv, rows)
    print(render(rows, ratios_only=smoke))
    for line in [] if smoke else _bars(rows):
        print(line)
    if chosen.plot:
        for path in plot(rows, chosen.plot):
            print(f"wrote {path}")
    bad = say_bad(rows)
    print(f"{time.monotonic() - started:.0f} s in all")
    return int(bad)


def _bars(rows) -> list[str]:
    """The aims for a recommendation in direct mode at batch 1, and what came out."""
    from end_to_end import BARS, DIRECT, SUITE

    first = {row.method: row for row in rows if row.suite == SUITE and row.shape["B"] == 1}
    own, lines = first.get(DIRECT), []
    for method, least in BARS:
        peer = first.get(method)
        if own and peer and own.median_ms and peer.median_ms:
            ratio = peer.median_ms / own.median_ms
            verdict = "met" if ratio >= least else "MISSED"
            lines.append(f"{DIRECT} against {method}: {ratio:.1f}x (bar {least:.0f}x: {verdict})")
    return lines


def _serve(chosen, device: str, entries, started: float) -> int:
    from machine import describe
    from worker import serve

    imported = time.monotonic()
    settings = _settings(
        chosen, device, GPU_SECONDS if chosen.suite == "gpu" else 1.5, float("inf")
    )
    machine = describe(device, rates=not settings.untimed)
    spent = {"imports": imported - started, "device": time.monotonic() - imported}
    serve(entries, settings, machine, spent)
    return 0


def _worker_arguments(chosen, names: Sequence[str]) -> list[str]:
    out = ["--suite", ",".join(names), "--op", chosen.op, "--threads", str(chosen.threads)]
    out += ["--method", chosen.method, "--repeats", str(chosen.repeats)] + (
        ["--graph"] if chosen.graph else []
    )
    out += ["--rehearse"] if chosen.rehearse else []
    out += ["--dtype", chosen.dtype] if chosen.dtype else []
    for name in ("model", "titles"):
        if getattr(chosen, name) is not None:
            out += [f"--{name}", str(getattr(chosen, name))]
    return out


def _base(chosen, names, entries, started: float) -> int:
    import commits

    if _interpreted():
        sys.exit("--base: compares times, and TRITON_INTERPRET=1 gives none")
    arguments = _worker_arguments(chosen, names)
    rows = []
    with (
        commits.worktree(chosen.base) as folder,
        commits.side(folder, arguments) as base,
        commits.side(commits.ROOT, arguments) as here,
    ):
        print("\n".join(here.machine.lines()))
        keys = [entry.key for entry in entries]
        for row in commits.compare(
            base, here, keys, repeats=chosen.repeats, seconds=1.5, deadline=started + chosen.budget
        ):
            print(f"  done: {row.key}: {row.verdict}", file=sys.stderr, flush=True)
            rows.append(row)
    print(commits.render(rows, chosen.base))
    if chosen.csv:
        commits.write_json(chosen.csv, rows, chosen.base)
    return int(any(row.verdict == "slower" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

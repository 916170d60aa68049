"""Does reasoning pay where it must, and what takes it away: controls in a generated world.

    python benchmarks/reasoning.py --output_dir runs/reasoning --seeds 0 1 2 3 4

Every seed has a world, a warmed-up model and a data sample of its own. A finished run of a seed is
kept and not done again; the same command goes on after a stop. Processes with other seeds may work
in the same output_dir at the same time, each on a core of its own. The table, results.json and the
picture are of all seeds that the directory holds. What each run is: docs/guides/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
import warnings
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """0; 2 for settings that cannot be."""
    chosen = _parser().parse_args(arguments)
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(chosen.threads)
    transformers_logging.disable_progress_bar()
    logging.getLogger("r2ec_fast").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "reduction 'token'", FutureWarning)  # asked for as a control
    try:
        return _run(chosen)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(chosen: argparse.Namespace) -> int:
    from chain_lab import Sizes
    from machine import describe
    from reasoning_report import Store
    from reasoning_runs import with_needed

    sizes = Sizes(**{field.name: getattr(chosen, field.name) for field in _fields()})
    names = with_needed(chosen.runs)
    sizes.world(0)  # says at once what cannot be
    machine = describe("cpu", rates=False)
    settings = {
        "sizes": dataclasses.asdict(sizes),
        "machine": machine.name,
        "threads": machine.threads,
        "versions": machine.versions,
        "commit": machine.commit,
    }
    store = Store(chosen.output_dir, settings)
    for seed in chosen.seeds:
        _seed(store, sizes, seed, names)
    header = [
        f"{machine.name}, {machine.threads} threads | {machine.versions} | commit {machine.commit}",
        f"{settings['sizes']}",
    ]
    print(store.report(header))
    return 0


def _seed(store, sizes, seed: int, names: list[str]) -> None:
    """Do what is not done yet of a seed."""
    from chain_lab import Lab
    from reasoning_runs import Context, every_run

    lab, done = Lab(sizes, seed), store.finished(seed)
    for name in names:
        if name in done:
            continue
        started = time.process_time()
        done[name] = every_run()[name].do(Context(lab, store.folder(seed), done))
        store.add(seed, name, done[name])
        shown = ", ".join(f"{row} {m['ndcg@10']:.3f}" for row, m in done[name].rows.items())
        print(
            f"seed {seed}, {name}, {time.process_time() - started:.0f} CPU s: {shown}", flush=True
        )


def _fields():
    from chain_lab import Sizes

    return dataclasses.fields(Sizes)


def _parser() -> argparse.ArgumentParser:
    from reasoning_runs import RUNS, every_run

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reasoning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--runs",
        nargs="+",
        default=list(RUNS),
        help=f"some of {', '.join(every_run())}; what these need is done too; settings: all that "
        "vary a setting",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="a process on one core each is fastest"
    )
    for field in _fields():
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return parser


if __name__ == "__main__":
    sys.exit(main())

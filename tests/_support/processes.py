"""Processes that tests start: they find the packages of this checkout and these helpers."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with `changes`, and the tests' folder on the module path."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}


def run_ranks(script: Path, ranks: int, *arguments: object) -> list[tuple[str, int]]:
    """Output and exit status of `script RANK RANKS ARGUMENTS...` for each rank, run together."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, (rank, ranks, *arguments))],
            env=environment(OMP_NUM_THREADS="1"),
            cwd=script.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    return [(p.communicate(timeout=200)[0], p.returncode) for p in processes]


def assert_dead_rank_named(results: list[tuple[str, int]], dead: int) -> None:
    """Rank `dead` was killed; each other one printed "SECONDS s: ERROR" with its name, soon."""
    for rank, (output, code) in enumerate(results):
        if rank == dead:
            assert code == -9, output
            continue
        assert code == 7, output
        found = re.search(r"([\d.]+) s: .*do not answer: \[(.*)\]", output)
        assert found and found[2] == str(dead), output
        assert float(found[1]) < 60

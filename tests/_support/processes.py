"""Processes that tests start: they find the packages of this checkout and these helpers."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with `changes`, and the tests' folder on the module path."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}

"""Lines for whoever started the program."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print a line on stdout at once, also where stdout is a file or a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

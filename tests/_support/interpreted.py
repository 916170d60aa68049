"""Triton kernels without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from _support.processes import environment


def run_interpreted(script: Path, *arguments: str) -> str:
    """What `script` prints when it runs in a process of its own, with Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment(TRITON_INTERPRET="1"),
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

"""The reward kernels in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_interpreted_kernels_equal_the_reference():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_reward_check.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases 36" in done.stdout

"""The soak of `soak.py`, for some seconds. The long one: `soak.py --minutes 10`."""

import subprocess
import sys
from pathlib import Path

import pytest
from _support.processes import environment


@pytest.mark.parametrize("minutes", [0.05, pytest.param(2.0, marks=pytest.mark.slow)])
def test_answers_stay_right_while_rows_are_written_and_interrupts_arrive(minutes):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("soak.py")), "--minutes", str(minutes)],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong answers or errors: 0; threads that hang: 0" in done.stdout

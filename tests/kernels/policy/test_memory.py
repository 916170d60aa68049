"""The loss holds a block of logits, whatever the vocabulary and the number of tokens."""

import os
import subprocess
import sys
from pathlib import Path

SIZES = ("512x64000", "512x256000", "2048x64000", "2048x256000")


def test_peak_memory_is_a_fiftieth_of_the_logits_and_flat():
    script = Path(__file__).with_name("memory_check.py")
    done = subprocess.run(
        [sys.executable, str(script), *SIZES],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # each thread has buffers of its own
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    peaks = dict(zip(SIZES, map(float, done.stdout.split()), strict=True))
    logits_mib = 512 * 256_000 * 4 / 2**20
    assert peaks["512x256000"] <= logits_mib / 50, peaks
    assert max(peaks.values()) <= 1.5 * min(peaks.values()) + 2, peaks

"""The reward kernels in Triton's interpreter, in a process of its own."""

from pathlib import Path

import pytest
from _support.interpreted import run_interpreted


def test_interpreted_kernels_equal_the_reference():
    pytest.importorskip("triton")
    assert "cases 36" in run_interpreted(Path(__file__).with_name("triton_check.py"))

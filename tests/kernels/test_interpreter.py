"""The tests of kernels themselves: what happens in the interpreter's process is told here."""

import subprocess
import sys

import pytest
from _support.interpreter import interpreter_problem
from _support.processes import environment

CONFTEST = """
from _support import interpreter

def pytest_configure(config):
    for mark in ("gpu", "interpreter"):
        config.addinivalue_line("markers", mark)
    config.pluginmanager.register(interpreter)
"""
FILE = """
import os
import pytest

@pytest.mark.parametrize("number", [1, 2, pytest.param(3, marks=pytest.mark.gpu)])
def test_numbers(number, device):
    assert device == "cpu" and os.environ["TRITON_INTERPRET"] == "1"
    print("told", "there")
    assert number != 2, "two is wrong"

def test_types(device, dtype):
    if str(dtype) == "torch.float16":
        pytest.skip("no reason at all")

@pytest.fixture
def broken(device):
    if os.environ.get("TRITON_INTERPRET"):
        raise OSError("no table")

def test_fixture(broken):
    pass

def test_crash(device):
    os._exit(7)
"""


def test_each_case_is_told_by_name(tmp_path):
    if problem := interpreter_problem():
        pytest.skip(problem)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_kernel.py").write_text(FILE)
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", "-rA", "-p", "no:cacheprovider"]
    variables = {k: v for k, v in environment().items() if not k.startswith("PYTEST_")}
    variables.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=200
    )
    told = done.stdout.splitlines()
    for line in (
        "PASSED test_kernel.py::test_numbers[interpreter-1]",
        "PASSED test_kernel.py::test_types[interpreter-float32]",
        "FAILED test_kernel.py::test_numbers[interpreter-2] - ",
        "FAILED test_kernel.py::test_types[interpreter-float16] - ",  # a skip there is no pass
        "FAILED test_kernel.py::test_fixture[interpreter] - ",
        "FAILED test_kernel.py::test_crash[interpreter] - ",
        "in Triton's interpreter: 2 passed, 4 failed",
    ):
        assert any(found.startswith(line) for found in told), line + "\n" + done.stdout
    assert not any("interpreter-3" in found for found in told)
    for words in ("two is wrong", "told there", "no reason at all", "no table", "not finished"):
        assert words in done.stdout, words


LOOP = """
import sys
import torch
import triton
import triton.language as tl

@triton.jit
def sum_of_rows(x_ptr, out_ptr, length_ptr, BLOCK: tl.constexpr):
    length = tl.load(length_ptr + tl.program_id(0))
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0), length):  # of numbers that the kernel has computed
        total += tl.load(x_ptr + start * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)

x, out, lengths = torch.ones(4, 8), torch.zeros(2, 8), torch.tensor([3, 4])
sum_of_rows[(2,)](x, out, lengths, BLOCK=8)
assert out.eq(3).all(), out
assert sys.argv[1:] == ["a", "b"] and sys.path[0] == SCRIPT_FOLDER
print("counted")
"""


def test_a_loop_runs_to_a_number_of_the_kernel(tmp_path):
    """Not so by itself in triton 3.6 with numpy 2.4 or newer: ``_support.old_triton``."""
    if problem := interpreter_problem():
        pytest.skip(problem)
    script = tmp_path / "loop.py"
    script.write_text(LOOP.replace("SCRIPT_FOLDER", repr(str(tmp_path))))
    command = [sys.executable, "-m", "_support.old_triton", str(script), "a", "b"]
    done = subprocess.run(
        command, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=200
    )
    assert done.stdout == "counted\n", done.stderr

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

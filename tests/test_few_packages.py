"""pytest -m gpu on a machine that lacks packages which other tests need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from _support.processes import environment

CONFTEST = """
import sys
from _support import few_packages

def pytest_configure(config):
    config.addinivalue_line("markers", "gpu")
    config.pluginmanager.register(few_packages)
"""
TEST = """
import pytest

@pytest.mark.gpu
@pytest.mark.timeout(60)
def test_it():
    pass
"""
ABSENT = "import a_package_that_nobody_has\n"


def collect(folder: Path, mark: str) -> str:
    variables = {k: v for k, v in environment().items() if not k.startswith("PYTEST_")}
    options = ["-p", "no:cacheprovider", "-p", "no:timeout", "--strict-markers", "-rs"]
    command = [sys.executable, "-m", "pytest", *options, "-m", mark, "--import-mode=importlib"]
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=100
    )
    return done.stdout


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in {
        "pytest.ini": "[pytest]\n",
        "conftest.py": CONFTEST,
        "test_here.py": TEST,
        "test_absent.py": ABSENT + TEST,
        os.path.join("inner", "conftest.py"): ABSENT,
        os.path.join("inner", "test_inner.py"): TEST,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_files_and_folders_that_lack_a_package_are_skipped(folder):
    told = collect(folder, "gpu")
    assert "1 passed, 2 skipped" in told, told
    assert told.count("a_package_that_nobody_has is not installed") >= 1, told


def test_only_with_the_mark_gpu_alone(folder):
    assert "2 errors" in collect(folder, "gpu or slow")


def test_our_own_packages_are_never_what_is_missing(folder):
    (folder / "test_absent.py").write_text("import r2ec_kernels.nothing\n" + TEST)
    told = collect(folder, "gpu")
    assert "1 error" in told and "r2ec_kernels.nothing" in told, told

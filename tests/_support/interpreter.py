"""Kernel tests on a GPU and, without one, in Triton's interpreter: a plugin of pytest.

A test that takes ``device`` becomes two, one on "cuda" with the mark gpu and one on "cpu" with the
mark interpreter; one that takes ``dtype`` too is run in every type of either. Triton chooses its
interpreter when it is imported, so the second kind cannot run in this process: the selected tests
of a file run in one process of their own, by pytest with TRITON_INTERPRET=1, and each of them
passes or fails here with what it did there.

Large cases carry the mark gpu themselves and have no second kind; a test that is about the
interpreter alone carries its mark and has no kind on a GPU. A module with many cases may set
INTERPRETED_SHARE = n: about one in n, drawn by the hash of its name, runs in the interpreter by
default, and the others with -m slow.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from _support import old_triton
from _support.processes import environment

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# what the interpreter multiplies rightly; a module whose kernels widen may name its own
DEFAULT_TYPES = ("float32", "float16")
CUDA_TYPES = ("float32", "bfloat16", "float16")
TIMEOUT = 900  # seconds, of the tests of a file

_PLAN = "R2EC_TEST_PLAN"  # the file that tells an inner pytest which tests to run
_REPORTS = pytest.StashKey[dict[Path, dict[str, dict]]]()
_SELECTED = pytest.StashKey[dict[Path, list[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_REPORTS], config.stash[_SELECTED] = {}, {}
    if INTERPRETED and interpreter_problem() is None:
        old_triton.mend()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" not in metafunc.fixturenames:
        return
    kinds = [("cuda", CUDA_TYPES, pytest.mark.gpu)]
    if metafunc.definition.get_closest_marker("interpreter"):
        kinds = []  # it is about the interpreter alone
    if metafunc.definition.get_closest_marker("gpu") is None:
        types = getattr(metafunc.module, "INTERPRETED_TYPES", DEFAULT_TYPES)
        kinds.append(("interpreter", types, pytest.mark.interpreter))
    if "dtype" not in metafunc.fixturenames:
        found = [pytest.param(name, marks=mark, id=name) for name, _, mark in kinds]
        metafunc.parametrize("device", found, indirect=True)
        return
    found = [
        pytest.param(name, dtype, marks=mark, id=f"{name}-{dtype}")
        for name, types, mark in kinds
        for dtype in types
    ]
    metafunc.parametrize(("device", "dtype"), found, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the tensors of a kernel test are: "cuda", or "cpu" for Triton's interpreter."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent  # one for all workers
    request.node.stash[_FOLDER] = folder
    return "cpu" if request.param == "interpreter" else request.param


@pytest.fixture
def dtype(request: pytest.FixtureRequest):
    """The type of a kernel test's floats."""
    import torch

    return getattr(torch, request.param)


_FOLDER = pytest.StashKey[Path]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not _is_only_for_gpus(item)]
    for item in items:
        share = getattr(getattr(item, "module", None), "INTERPRETED_SHARE", 1)
        if item.get_closest_marker("interpreter") and zlib.crc32(item.name.encode()) % share:
            item.add_marker(pytest.mark.slow)
    if INTERPRETED:
        if os.environ.get(_PLAN):
            wanted = set(json.loads(Path(os.environ[_PLAN]).read_text()))
            items[:] = [item for item in items if item.name in wanted]
        return
    for item in items:
        if item.get_closest_marker("interpreter"):
            if config.pluginmanager.hasplugin("xdist"):  # with --dist loadgroup
                item.add_marker(pytest.mark.xdist_group(item.path.stem))
            if config.pluginmanager.hasplugin("timeout"):
                item.add_marker(pytest.mark.timeout(2 * TIMEOUT))


def _is_only_for_gpus(item: pytest.Item) -> bool:
    """Whether it is the interpreter's half of a case whose parameters are marked gpu."""
    return bool(item.get_closest_marker("gpu") and item.get_closest_marker("interpreter"))


def pytest_collection_finish(session: pytest.Session) -> None:
    selected = session.config.stash[_SELECTED]
    for item in session.items:
        if item.get_closest_marker("interpreter"):
            selected.setdefault(item.path, []).append(item.name)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """The test's outcome in the interpreter's process."""
    if INTERPRETED or pyfuncitem.get_closest_marker("interpreter") is None:
        return None
    if problem := interpreter_problem():
        pytest.skip(problem)
    config, path = pyfuncitem.config, pyfuncitem.path
    reports = config.stash[_REPORTS]
    if path not in reports:
        names = config.stash[_SELECTED][path]
        reports[path] = _run_once(path, names, pyfuncitem.stash[_FOLDER])
    found = reports[path]
    report = found.get(pyfuncitem.name)
    if report is None:
        pytest.fail(f"did not run in the interpreter:\n{found['']['text']}", pytrace=False)
    if report["outcome"] != "passed":
        pytest.fail(f"{report['outcome']} in the interpreter:\n{report['text']}", pytrace=False)
    return True


def interpreter_problem() -> str | None:
    """Why Triton's interpreter cannot run here, or None."""
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


def _run_once(path: Path, names: list[str], folder: Path) -> dict[str, dict]:
    """Reports of a file's tests by name, "" for the process itself; xdist's workers share them."""
    results = folder / f"interpreter-{path.parent.name}-{path.stem}.json"
    with results.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not results.exists():
            results.write_text(json.dumps(_run(path, names, results)))
    return json.loads(results.read_text())


def _run(path: Path, names: list[str], results: Path) -> dict[str, dict]:
    plan, lines = results.with_suffix(".plan"), results.with_suffix(".jsonl")
    plan.write_text(json.dumps(names))
    lines.touch()
    own = {k: v for k, v in environment().items() if not k.startswith("PYTEST_")}
    own |= {"TRITON_INTERPRET": "1", _PLAN: str(plan), "R2EC_TEST_REPORTS": str(lines)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreter"]
    with subprocess.Popen(
        [*command, str(path)],
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            output = f"stopped after {TIMEOUT} s\n" + process.communicate()[0]
    found = {"": {"outcome": process.returncode, "text": output}}
    for line in lines.read_text().splitlines():
        report = json.loads(line)
        name = report.pop("name")
        before = found.setdefault(name, {"outcome": "passed", "text": "", "called": False})
        before["called"] |= report["when"] == "call"
        if report["outcome"] != "passed":
            before["outcome"] = report["outcome"]
            before["text"] += f"{report['when']}: {report['text']}\n"
    for name, report in found.items():
        if name and report["outcome"] == "passed" and not report["called"]:
            report |= {"outcome": "not finished", "text": output}
    return found


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the interpreter's process: each phase of a test as a line."""
    if INTERPRETED and os.environ.get("R2EC_TEST_REPORTS"):
        sections = "".join(f"\n-- {name}\n{text}" for name, text in report.sections)
        line = {
            "name": report.nodeid.split("::", 1)[1],
            "when": report.when,
            "outcome": report.outcome,
            "text": report.longreprtext + sections if report.outcome != "passed" else "",
        }
        with open(os.environ["R2EC_TEST_REPORTS"], "a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_terminal_summary(terminalreporter) -> None:
    stats = terminalreporter.stats
    counts = {
        outcome: sum("interpreter" in getattr(r, "keywords", ()) for r in stats.get(outcome, []))
        for outcome in ("passed", "failed", "skipped", "error")
    }
    if any(counts.values()) and not INTERPRETED:
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        terminalreporter.write_line(f"in Triton's interpreter: {told}")

# ruff: noqa: E402  the benchmarks are scripts, found after their folder is on the path
"""The benchmark command: two commits, the rented hour, what it needs and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import commits
import gpu_suite
import harness
import latency
from commits import Compared
from harness import Row
from registry import Options, all_entries, suites


def run_latency(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "latency.py"), *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280
    )


# ---- two commits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "here", "verdict"),
    [
        ([10.0] * 5, [10.2, 9.9, 10.0, 10.1, 10.0], "same"),
        ([10.0] * 5, [12.0, 12.1, 11.9, 12.0, 12.0], "slower"),
        ([12.0] * 5, [10.0] * 5, "faster"),
        ([10.0, 20.0, 10.0, 20.0, 10.0], [12.0, 24.0, 12.0, 24.0, 12.0], "slower"),  # pairs
        ([10.0] * 5, [9.0, 9.5, 12.0, 12.5, 13.0], "same"),  # noise
        ([], [], "failed"),
    ],
)
def test_verdicts(base, here, verdict):
    assert Compared("row", tuple(base), tuple(here)).verdict == verdict


class FakeSide:
    """A worker whose method takes ``seconds``; it notes when it was asked."""

    def __init__(self, name: str, seconds: float, log: list, status: str = "ok") -> None:
        self.name, self.seconds, self.log, self.status = name, seconds, log, status

    def ask(self, question: dict, timeout: float) -> dict:
        if "open" in question:
            row = {"method": "m", "status": self.status, "note": ""}
            return {"rows": [row], "seconds": {"m": self.seconds}}
        self.log.append(self.name)
        return {"seconds": self.seconds}


def test_a_planted_slow_down_is_noticed_in_turns():
    log: list[str] = []
    sides = FakeSide("base", 0.010, log), FakeSide("here", 0.013, log)
    [row] = commits.compare(*sides, ["key"], repeats=6, seconds=1.0)
    assert row.verdict == "slower" and row.ratios == pytest.approx([1.3] * 6)
    assert log == ["base", "here", "here", "base"] * 3
    assert "1.30 [1.30-1.30] slower" in commits.render([row], "HEAD~1")


def test_a_side_that_is_wrong_has_no_ratio():
    sides = FakeSide("base", 1.0, []), FakeSide("here", 0.1, [], status="WRONG")
    [row] = commits.compare(*sides, ["key"], repeats=2, seconds=1.0)
    assert row.verdict == "failed" and "here WRONG" in row.note


def test_an_unknown_commit_is_an_error(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    with (
        pytest.raises(ValueError, match="no-such-commit"),
        commits.worktree("no-such-commit", tmp_path),
    ):
        pass


@pytest.mark.slow
def test_a_slow_commit_is_noticed_for_real(tmp_path):
    """Two commits of a copy of the library, the second with a pause in every search."""
    repository = tmp_path / "repository"
    for folder in ("r2ec_fast", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / folder, repository / folder, ignore=ignore)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        command = ["git", "-C", str(repository), *identity, "-c", "core.hooksPath=/dev/null"]
        done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "as it is")
    fast = git("rev-parse", "HEAD")
    path = repository / "kernels/r2ec_kernels/search/api.py"
    text = path.read_text()
    marked = "    scores, indices = torch.ops.r2ec_kernels.item_topk("
    assert text.count(marked) == 1
    path.write_text(text.replace(marked, f"    import time\n    time.sleep(0.2)\n{marked}"))
    git("commit", "-q", "-am", "sleep in every search")
    op = "item_head | top-K | N=2000 d=32 B=4"
    arguments = ["--suite", "smoke", "--op", op]
    with (
        commits.worktree(fast, repository) as old,
        commits.worktree("HEAD", repository) as new,
        commits.side(old, arguments) as base,
        commits.side(new, arguments) as here,
    ):
        key = f"{op} k=10"
        rows = {r.key: r for r in commits.compare(base, here, [key], repeats=5, seconds=1.0)}
    assert rows[f"{key} | item_topk"].verdict == "slower"
    assert rows[f"{key} | torch"].verdict != "failed"
    assert git("worktree", "list").count("\n") == 0  # both are gone


# ---- the rented hour -----------------------------------------------------------------------------


class FakeWorker:
    """Answers for `limit` entries, then runs out of time."""

    limit = 3
    asked: list[str] = []

    def __init__(self, command, environment, timeout) -> None:
        assert environment == gpu_suite.INTERPRETED
        self.machine = harness.Machine(
            "m", "cpu", "float32", 1, "v", "c", "s", "", float("nan"), float("nan")
        )

    def ask(self, question: dict, timeout: float) -> dict:
        if len(self.asked) >= self.limit:
            raise TimeoutError
        key = question["measure"]
        self.asked.append(key)
        row = Row("kernels", key, {}, "triton", "interpreted")
        return {"rows": [row.as_dict()]}

    def stop(self) -> None:
        pass


def run_gpu(path: Path, budget: float = 60.0) -> list[Row]:
    return gpu_suite.run(
        Options(), [], started=time.monotonic(), budget=budget, path=path, say=lambda line: None
    )


@pytest.mark.slow
def test_the_gpu_suite_stops_and_goes_on_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "asked", [])
    path = tmp_path / "rows.json"
    assert len(run_gpu(path)) == 2 + 3  # build, tests, three rows
    assert len(json.loads(path.read_text())["rows"]) == 5
    monkeypatch.setattr(FakeWorker, "limit", 100)
    rows = run_gpu(path)
    keys = [entry.key for entry in gpu_suite.entries(Options())]
    assert FakeWorker.asked == keys and len(rows) == 2 + len(keys)
    assert list(tmp_path.iterdir()) == [path]
    run_gpu(path)
    assert FakeWorker.asked == keys  # nothing left to do


def test_a_row_that_kills_its_process_is_a_row(tmp_path, monkeypatch):
    class Dying(FakeWorker):
        def ask(self, question: dict, timeout: float) -> dict:
            if len(self.asked) == 1:
                self.asked.append("")
                raise gpu_suite.WorkerDied("segmentation fault")
            return super().ask(question, timeout)

    monkeypatch.setattr(gpu_suite, "Worker", Dying)
    monkeypatch.setattr(Dying, "limit", 4)
    monkeypatch.setattr(Dying, "asked", [])
    rows = run_gpu(tmp_path / "rows.json")[2:]
    assert [row.status for row in rows] == ["interpreted", "failed", "interpreted", "interpreted"]
    assert "segmentation fault" in rows[1].note


def test_rows_of_another_commit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "asked", [])
    path = tmp_path / "rows.json"
    run_gpu(path)
    stored = json.loads(path.read_text())
    stored["identity"]["commit"] = "0000000"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="commit '0000000'"):
        run_gpu(path)


def test_no_time_no_rows(tmp_path):
    assert run_gpu(tmp_path / "rows.json", budget=0.1) == []


@pytest.mark.slow
def test_kernel_rows_launch_every_kernel_and_pass_in_the_interpreter():
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import kernel_rows, triton
from harness import Settings, measure
from r2ec_kernels.aot import configurations
from triton.runtime.interpreter import InterpretedFunction

launched = set()
get = InterpretedFunction.__getitem__ if "__getitem__" in vars(InterpretedFunction) else None
base = triton.runtime.jit.KernelInterface.__getitem__

def noted(self, grid):
    launched.add(self.fn.__name__)
    return (get or base)(self, grid)

InterpretedFunction.__getitem__ = noted
for entry in kernel_rows.entries("cpu", tiny=True):
    for row in measure(entry, Settings(timed=False)):
        assert row.status == "interpreted", (row.key, row.status, row.note)
shipped = {case["kernel"].fn.__name__ for case in configurations()}
assert launched == shipped, (launched ^ shipped)
print(len(launched))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT / "benchmarks")],
        env={**os.environ, **gpu_suite.INTERPRETED},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 6


# ---- the command ---------------------------------------------------------------------------------


def test_list_names_every_suite_and_builds_nothing(capsys):
    names = "end_to_end,item_head,losses,packing,rollout,scale,kernels"
    assert latency.main(["--list", "--suite", names]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split(" | ")[0] for line in listed} == set(names.split(","))
    assert latency.main(["--list", "--suite", "item_head", "--op", "d=1024 B=16 "]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "speed"], "expected some of end_to_end"),
        (["--op", "no such op"], "no entry contains 'no such op' and ''"),
    ],
)
def test_unknown_names_are_errors(arguments, message):
    with pytest.raises(SystemExit, match=message):
        latency.main(arguments)


def test_only_torch_triton_numpy_and_transformers_are_needed(tmp_path):
    blocked = "polars peft accelerate trl liger_kernel faiss usearch pyarrow matplotlib scipy"
    code = f"import sys\nfor name in {blocked.split()!r}:\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    paths = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    csv_path = tmp_path / "rows.csv"
    done = run_latency(
        "--suite", "smoke", "--op", "B=1", "--repeats", "1", "--csv", str(csv_path),
        PYTHONPATH=paths,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    missing = {row["method"] for row in rows if row["status"] == "not installed"}
    assert missing == {"faiss", "usearch", "vLLM, 4 tokens"}
    assert {row["status"] for row in rows} == {"ok", "not installed"}
    assert all("random weights" in row["op"] for row in rows if row["suite"] == "end_to_end")


def test_every_entry_has_a_key_of_its_own():
    for tiny, device in ((True, "cpu"), (False, "cpu"), (False, "cuda")):
        names = [name for name in suites() if name != "smoke"]
        keys = [entry.key for entry in all_entries(names, Options(device, tiny=tiny))]
        assert len(keys) == len(set(keys))

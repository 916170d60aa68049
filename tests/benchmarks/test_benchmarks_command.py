# ruff: noqa: E402  the benchmarks are scripts, found after their folder is on the path
"""The benchmark command: two commits, what it needs and what it refuses."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import commits
import latency
from commits import Compared
from options import Options
from registry import all_entries, suites


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
    path = repository / "kernels/r2ec_kernels/topk/api.py"
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


# ---- the command ---------------------------------------------------------------------------------


def test_list_names_every_suite_and_builds_nothing(capsys):
    names = "end_to_end,item_head,losses,packing,rollout,scale,kernels,checks,ceilings"
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


def test_a_failed_row_is_named_at_the_end_and_in_the_exit_status(capsys):
    """Without a GPU the Triton kernels fail; so they do not pass."""
    arguments = ["--suite", "kernels", "--op", "reward", "--repeats", "1"]
    assert latency.main(arguments) == 1
    *_, named, last = capsys.readouterr().out.splitlines()
    assert named.startswith("failed: kernels | reward_and_advantage float32 | B=7 G=8 | triton: ")
    assert "s in all" in last


def test_interpreted_kernels_have_no_time():
    """Neither a time, nor a comparison of times."""
    arguments = ["--suite", "kernels", "--op", "reward"]
    done = run_latency(*arguments, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("reward_and")]
    assert len(table) == 2
    assert all(line.endswith("interpreted: checked, no timing") for line in table)
    assert " vs " not in "".join(table)
    refused = run_latency(*arguments, "--base", "HEAD", TRITON_INTERPRET="1")
    assert refused.returncode == 1 and "TRITON_INTERPRET" in refused.stderr


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

# ruff: noqa: E402  the benchmarks are scripts, found after their folder is on the path
"""The first minutes on a GPU: order, crashes, budget, files, and the rehearsal on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_rows
import gpu_suite
import sections
import views
from gpu_suite import Suite, verdict
from harness import Entry
from options import Options
from registry import all_entries, suites
from rows import Row

# what a GPU machine may lack
BLOCKED = (
    "polars jsonargparse pytest peft accelerate trl liger_kernel faiss usearch pyarrow matplotlib "
    "scipy rich r2ec_fast._packing"
)
STUB = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
from harness import Case, Entry, Settings
from machine import describe
from sections import in_order
from worker import serve

def right(_):
    return 0.0

def well():
    time.sleep({pause})

def cuda_error():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCompile with DSA")

def plain_error():
    raise RuntimeError("no such kernel")

def segfault():
    os.kill(os.getpid(), 11)

def hang():
    time.sleep(100)

def entry(op, section, *methods):
    made = lambda: [Case(name, run, right) for name, run in named.items()]
    named = {{method: globals()[method.split("-")[0]] for method in methods}}
    return Entry("toy", op, {{"N": 4}}, tuple(named), made, section=section)

def broken_build():
    os.kill(os.getpid(), 11)

entries = {entries}
serve(in_order(entries), Settings(untimed="rehearsed"), describe("cpu", rates=False), {{}})
"""


def stub(folder: Path, entries: Sequence[str], pause: float = 0.0) -> list[str]:
    """The command of a worker that has these entries."""
    path = folder / "stub.py"
    listed = f"[{', '.join(entries)}]"
    text = STUB.format(benchmarks=str(ROOT / "benchmarks"), entries=listed, pause=pause)
    path.write_text(textwrap.dedent(text))
    return [sys.executable, str(path)]


def suite_of(command: Sequence[str], path: Path, budget: float = 100.0) -> tuple[Suite, list[Row]]:
    lines: list[str] = []
    suite = Suite(command, {}, path, started=time.monotonic(), budget=budget, say=lines.append)
    return suite, suite.run()


def done_in(path: Path) -> list[str]:
    """Keys of the rows in a file, in order."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [Row(**row).key for row in rows]


# ---- order ---------------------------------------------------------------------------------------


def test_rows_come_in_the_order_of_the_sections_that_they_name():
    made = [Entry("s", name, {}, (), list, section=name) for name in ("loss", "ceilings")]
    forgotten = Entry("s", "says nothing", {}, (), list)
    placed = [entry.op for entry in sections.in_order([forgotten, *made])]
    assert placed == ["ceilings", "loss", "says nothing"]
    with pytest.raises(ValueError, match="expected one of ceilings, .* got 'losses'"):
        sections.in_order([Entry("s", "op", {}, (), list, section="losses")])
    assert sum(section.share for section in sections.SECTIONS) == pytest.approx(1.0)


@pytest.mark.parametrize("options", [Options("cuda"), Options("cpu", tiny=True)])
def test_no_row_is_forgotten(options):
    """Whatever names a section is in the suite, and every entry of the suite names one."""
    ours = gpu_rows.entries(options)
    names = [name for name in suites() if name != "smoke"]
    placed = {e.key for e in all_entries(names, options) if e.section != sections.REST}
    assert placed == {entry.key for entry in ours}
    order = list(dict.fromkeys(entry.section for entry in ours))
    assert order == [section.name for section in sections.SECTIONS][:-1]


def test_the_item_head_has_all_widths_and_batches_on_a_gpu():
    entries = [e for e in gpu_rows.entries(Options("cuda")) if e.section == "item head"]
    found = {(e.shape["d"], e.shape["B"]) for e in entries if "cuBLAS" in e.methods}
    assert found >= {(d, b) for d in (128, 576, 1024, 2304) for b in (1, 16, 64, 1024)}
    assert {e.shape["N"] for e in entries} == {10**6}
    assert {"kernel", "call", "torch", "cuBLAS"} == set(entries[0].methods)


# ---- crashes and hangs ---------------------------------------------------------------------------


def test_a_crash_costs_its_row_and_no_other(tmp_path):
    entries = (
        'entry("a", "loss", "well-1", "segfault", "well-2")',
        'entry("b", "loss", "cuda_error", "well", "plain_error")',
        'Entry("toy", "c", {"N": 4}, ("x", "y"), broken_build, section="loss")',
        'entry("d", "ranks", "well")',
    )
    suite, rows = suite_of(stub(tmp_path, entries), tmp_path / "rows.jsonl")
    found = {(row.op, row.method): (row.status, row.note) for row in rows}
    assert [row.op for row in rows] == ["d", "a", "a", "a", "b", "b", "b", "c", "c"]
    assert found["a", "segfault"] == ("failed", "its process ended: killed by SIGSEGV")
    assert found["b", "cuda_error"][0] == "failed"
    assert "illegal memory access" in found["b", "cuda_error"][1]
    assert found["b", "plain_error"] == ("failed", "RuntimeError: no such kernel")
    assert {found["c", "x"][0], found["c", "y"][0]} == {"failed"}
    well = [key for key, (status, _) in found.items() if status == "rehearsed"]
    assert well == [("d", "well"), ("a", "well-1"), ("a", "well-2"), ("b", "well")]
    assert suite.starts == 3  # the last crash has nothing after it


def test_failed_rows_are_named_and_make_the_exit_status(tmp_path, capsys):
    _, rows = suite_of(
        stub(tmp_path, ['entry("a", "loss", "well", "plain_error")']), tmp_path / "rows.jsonl"
    )
    assert verdict(rows) == 1
    named, last = capsys.readouterr().out.splitlines()
    assert named == "failed: toy | a | N=4 | plain_error: RuntimeError: no such kernel"
    assert last == "2 rows: 1 rehearsed, 1 failed"


def test_a_hanging_row_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "PATIENCE", 2.0)
    entries = ('entry("a", "loss", "hang", "well")',)
    _, rows = suite_of(stub(tmp_path, entries), tmp_path / "rows.jsonl")
    assert [row.status for row in rows] == ["failed", "rehearsed"]
    assert rows[0].note == "no answer within 2 s"


def test_the_profile_counts_what_a_call_launches(monkeypatch):
    """On a GPU, whose events stand in here; on a CPU its operators."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    seen = [("scan", cuda, 3e6), ("sort", cuda, 1e6), ("sort", cuda, 1e6), ("aten::sort", cpu, 9e6)]
    seen += [("cudaLaunchKernel", cpu, 1e3), ("cudaStreamSynchronize", cpu, 1e3)]
    events = [
        SimpleNamespace(
            name=lambda n=n: n, device_type=lambda d=d: d, duration_ns=lambda ns=ns: int(ns)
        )
        for n, d, ns in seen
    ]
    results = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))
    trace = nullcontext(SimpleNamespace(profiler=results))
    monkeypatch.setattr(views, "quiet_profile", lambda device: trace)
    monkeypatch.setattr(views, "synchronize", lambda device: None)
    told = views.launches(lambda: None, "cuda")
    assert told == "3 device operations, 5.000 ms, 1 waits: scan 3.000 ms x1, sort 2.000 ms x2"
    monkeypatch.undo()
    assert views.launches(lambda: torch.ones(3), "cpu").endswith("operators, counted on a CPU")


# ---- the budget ----------------------------------------------------------------------------------


def test_a_spent_budget_leaves_rows_that_are_not_reached(tmp_path, capsys):
    entries = [f'entry("op{i}", "loss", "well-1", "well-2")' for i in range(20)]
    command, path = stub(tmp_path, entries, pause=0.3), tmp_path / "rows.jsonl"
    _, rows = suite_of(command, path, budget=gpu_suite.SPARE + 7)
    statuses = [row.status for row in rows]
    reached = statuses.count("rehearsed")
    assert 0 < reached < 40 and statuses[reached:] == ["not reached"] * (40 - reached)
    assert verdict(rows) == 3
    out = capsys.readouterr().out
    assert "not reached: toy | op19 | N=4 | well-2" in out
    assert f"40 rows: {reached} rehearsed, {40 - reached} not reached; run again to go on" in out
    _, rows = suite_of(stub(tmp_path, entries), path)
    assert {row.status for row in rows} == {"rehearsed"} and verdict(rows) == 0
    assert len(done_in(path)) == len(set(done_in(path))) == 40  # none twice


def test_no_section_eats_the_budget_of_the_next(tmp_path):
    entries = [f'entry("long{i}", "ceilings", "well")' for i in range(6)]
    entries += ['entry("short", "loss", "well")']
    path = tmp_path / "rows.jsonl"
    suite_of(stub(tmp_path, entries, pause=0.5), path, budget=25.0)  # a share of 1 s
    order = [key.split(" | ")[1] for key in done_in(path)]
    assert order.index("short") in (1, 2, 3)
    assert order[-1] == "long5" and len(order) == 7


def test_no_time_is_said(tmp_path):
    with pytest.raises(gpu_suite.Over, match="the time is over"):
        suite_of(stub(tmp_path, ()), tmp_path / "rows.jsonl", budget=1.0)


# ---- the file ------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_from_its_file_and_leaves_no_worker(tmp_path):
    entries = [f'entry("op{i}", "loss", "well")' for i in range(8)]
    command, path = stub(tmp_path, entries, pause=0.3), tmp_path / "rows.jsonl"
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import sys, time\nfrom pathlib import Path\n"
        f"sys.path[:0] = [{str(ROOT / 'benchmarks')!r}]\nfrom gpu_suite import Suite\n"
        f"suite = Suite({command!r}, {{}}, Path({str(path)!r}), started=time.monotonic(),\n"
        "    budget=100.0, say=lambda line: None)\n"
        "suite._open(); print(suite.worker._process.pid, flush=True); suite.run()\n"
    )
    with subprocess.Popen(
        [sys.executable, str(parent)], stdout=subprocess.PIPE, text=True
    ) as process:
        worker = int(process.stdout.readline())
        wait_for(lambda: path.exists() and len(path.read_text().splitlines()) >= 3)
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: not running(worker))
    before = done_in(path)
    assert 2 <= len(before) < 8
    _, rows = suite_of(command, path)
    assert [row.status for row in rows] == ["rehearsed"] * 8
    assert done_in(path) == [f"toy | op{i} | N=4 | well" for i in range(8)]


def wait_for(condition, seconds: float = 30.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a machine without the modules that it may lack."""
    folder = tmp_path / "blocked"
    folder.mkdir()
    code = f"import sys\nfor name in {BLOCKED.split()!r}:\n    sys.modules[name] = None\n"
    (folder / "sitecustomize.py").write_text(code)
    paths = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": paths}


def rehearse(path: Path, *more: str) -> list[str]:
    """The command line of a rehearsal."""
    script = str(ROOT / "benchmarks" / "latency.py")
    return [sys.executable, script, "--suite", "gpu", "--rehearse", "--resume", str(path), *more]


def run(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_the_rehearsal_needs_torch_triton_numpy_and_transformers_alone(tmp_path, bare):
    """Some of its rows, picked by --op: one of a kernel, and rollouts of a language model."""
    path = tmp_path / "rows.jsonl"
    done = run(rehearse(path, "--op", "G="), bare)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()[1:]]
    assert {row.suite for row in rows} == {"checks", "kernels", "rollout"}
    assert {row.status for row in rows} == {"rehearsed"}
    assert all(row.median_ms is None and row.per_s is None for row in rows)
    assert "a rehearsal on a CPU in toy sizes: nothing was measured" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{len(rows)} rows: {len(rows)} rehearsed"
    # done rows are not done again
    again = run(rehearse(path, "--op", "G="), bare)
    assert f"{len(rows)} of {len(rows)} rows done before" in again.stdout
    assert len(path.read_text().splitlines()) == 1 + len(rows)


@pytest.mark.slow
def test_a_whole_rehearsal_that_is_killed_and_goes_on(tmp_path, bare):
    path = tmp_path / "rows.jsonl"
    command = rehearse(path, "--budget", "250")
    with subprocess.Popen(command, env=bare, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: path.exists() and len(path.read_text().splitlines()) > 20, 120)
        process.send_signal(signal.SIGKILL)
    before = done_in(path)
    done = run(command, bare)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    entries = gpu_rows.entries(Options("cpu", tiny=True))
    keys = [f"{entry.key} | {method}" for entry in entries for method in entry.methods]
    assert done_in(path) == keys and 20 <= len(before) < len(keys)
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()[1:]]
    others = {row.method: row.status for row in rows if row.status != "rehearsed"}
    assert others == {
        "TRL chunked log-prob": "not installed",
        "Liger GRPO": "not installed",
        "graph replay": "skipped",
    }


@pytest.mark.slow
def test_the_rehearsal_launches_every_kernel():
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import kernel_checks, triton
from harness import Settings, measure
from options import Options
from r2ec_kernels.aot import configurations
from triton.runtime.interpreter import InterpretedFunction

launched = set()
get = InterpretedFunction.__getitem__ if "__getitem__" in vars(InterpretedFunction) else None
base = triton.runtime.jit.KernelInterface.__getitem__

def noted(self, grid):
    launched.add(self.fn.__name__)
    return (get or base)(self, grid)

InterpretedFunction.__getitem__ = noted
for entry in kernel_checks.entries(Options(tiny=True)):
    for row in measure(entry, Settings(untimed="interpreted")):
        assert row.status == "interpreted", (row.key, row.status, row.note)
shipped = {case["kernel"].fn.__name__ for case in configurations()}
assert launched == shipped, (launched ^ shipped)
print(len(launched))
"""
    done = run(
        [sys.executable, "-c", script, str(ROOT / "benchmarks")],
        {**os.environ, **gpu_suite.REHEARSAL},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 6


def test_without_a_gpu_nothing_is_measured(tmp_path):
    path = tmp_path / "rows.jsonl"
    command = [part for part in rehearse(path) if part != "--rehearse"]
    done = run(command, {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and not path.exists()
    assert "no GPU to measure here; --rehearse" in done.stderr


def test_the_process_that_keeps_order_needs_no_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import latency, gpu_suite, table; "
    code += "sys.exit('torch' in sys.modules)"
    assert (
        run([sys.executable, "-c", code, str(ROOT / "benchmarks")], {**os.environ}).returncode == 0
    )

"""Faults of a run: each with the state it leaves behind, and the way on."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from _support.training import launch, launch_two, lines, run, same, toy_trainer

from r2ec_fast.rollout import RolloutServerError
from r2ec_fast.train import checkpoint
from r2ec_fast.train.checkpoint import CheckpointError

QUIET = {"eval_steps": 0}
ENDLESS = {"max_steps": 10_000, "eval_steps": 0, "save_steps": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    return out, *run(out, max_steps=8)


def equals(whole, out: Path, metrics: dict, parameters: dict) -> None:
    assert metrics == whole[1]
    same(parameters, whole[2], rtol=0, atol=0)
    assert lines(out) == lines(whole[0])


def wait_for(path: Path, processes, text: str = "") -> None:
    deadline = time.monotonic() + 240
    while not (path.exists() and (not text or text in path.read_text())):
        assert all(p.poll() is None for p in processes), "a process ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_killed_at_a_random_point_then_resumed(tmp_path, whole, seed):
    out = tmp_path / "killed"
    process = launch(out, "recpo", {"max_steps": 8})
    wait_for(out / "checkpoint-2", [process])
    time.sleep(random.Random(seed).uniform(0, 1))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    equals(whole, out, *run(out, max_steps=8, resume_from_checkpoint="latest"))
    assert not list(out.glob(".*"))


def test_what_a_killed_process_was_writing_is_cleared(tmp_path):
    (tmp_path / ".r2ec-partial-checkpoint-4-abc").mkdir()
    best = tmp_path / "best"
    (best / ".r2ec-partial-abc").mkdir(parents=True)
    (best / "loop.safetensors").write_text("old")
    (best / "notes.txt").write_text("a user's")
    committed = best / ".r2ec-committed"
    committed.mkdir()
    (committed / "trainer_state.json").write_text("new")
    (committed / ".obsolete.json").write_text('["loop.safetensors"]')
    checkpoint.clear_interrupted(tmp_path)
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    assert found == {"best", "best/notes.txt", "best/trainer_state.json"}


def fail_at(monkeypatch, name: str, error: OSError) -> None:
    """Let safetensors fail when it writes a file in the directory of this name."""
    import safetensors.torch

    save = safetensors.torch.save_file

    def full(tensors, path, *rest, **options):
        if f"-{name}-" in str(path):
            save(tensors, path, *rest, **options)  # some of it lies there already
            raise error
        return save(tensors, path, *rest, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)


def test_full_disk_leaves_the_checkpoint_before(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, "checkpoint-4", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(OSError, match="checkpoint-4 cannot be written.*No space left.*resume"):
            run(tmp_path, max_steps=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "checkpoint-2", "metrics.jsonl"]
    equals(whole, tmp_path, *run(tmp_path, max_steps=8, resume_from_checkpoint="latest"))


def test_a_real_write_error_is_told(tmp_path):
    trainer = toy_trainer(tmp_path, **QUIET)
    trainer.table.refresh(0)
    trainer._save("checkpoint-1")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        with pytest.raises(OSError, match="checkpoint-2 cannot be written"):
            trainer._save("checkpoint-2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "name",
    [
        checkpoint.TRAINABLE_FILE,
        checkpoint.OPTIMIZER_FILE,
        checkpoint.LOOP_FILE,
        checkpoint.INDEX_FILE,
        checkpoint.STATE_FILE,
    ],
)
def test_a_damaged_latest_checkpoint_names_the_one_before(tmp_path, whole, name):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    broken = out / "checkpoint-8" / name
    broken.write_bytes(broken.read_bytes()[:-100])
    trainer = toy_trainer(out, max_steps=8, resume_from_checkpoint="latest")
    before = {n: p.detach().clone() for n, p in trainer.parameters.items()}
    with pytest.raises(
        CheckpointError, match=f"{name}: damaged.*resume_from_checkpoint=.*checkpoint-6"
    ):
        trainer.train()
    same({n: p.detach() for n, p in trainer.parameters.items()}, before, rtol=0, atol=0)
    assert not trainer.optimizer.state


def test_the_checkpoint_before_a_damaged_one_goes_on(tmp_path, whole):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    (out / "checkpoint-8" / checkpoint.STATE_FILE).write_text("{")
    wanted = str(out / "checkpoint-6")
    equals(whole, out, *run(out, max_steps=8, resume_from_checkpoint=wanted))


def test_a_dead_rollout_server_ends_the_run_and_it_resumes(tmp_path, whole):
    class Dying:
        def __init__(self, engine):
            self.engine = engine

        def generate(self, *arguments, **settings):
            if settings["step"] == 4:
                raise RolloutServerError("vLLM server http://there does not answer")
            return self.engine.generate(*arguments, **settings)

    torch.set_num_threads(1)
    trainer = toy_trainer(tmp_path, max_steps=8)
    trainer.engine = Dying(trainer.engine)
    with pytest.raises(RolloutServerError, match="does not answer"):
        trainer.train()
    equals(whole, tmp_path, *run(tmp_path, max_steps=8, resume_from_checkpoint="latest"))


def test_a_rollout_server_that_is_not_there_is_named_before_the_first_step(tmp_path):
    where = {"rollout_server": "http://127.0.0.1:9", "use_lora": True}
    with pytest.raises(RolloutServerError, match="127.0.0.1:9 does not answer.*vllm serve MODEL"):
        toy_trainer(tmp_path, **where)
    with pytest.raises(ValueError, match="rollout_server: sharded weights"):
        toy_trainer(tmp_path, **where, fsdp=True)
    with pytest.raises(ValueError, match="rollout_server: needs use_lora"):
        toy_trainer(tmp_path, **where | {"use_lora": False})


# ---- two processes -------------------------------------------------------------------------------

FAILS = """
from r2ec_fast.train.update import PolicyUpdate
def fails(*arguments): raise ValueError("planted")
if os.environ["RANK"] == "1":
    PolicyUpdate._micro_batch = fails
"""


def text_of(process, path: Path, timeout: float = 240) -> str:
    assert process.wait(timeout=timeout) == 1
    return path.read_text()


def test_a_process_that_fails_is_named_by_the_others(tmp_path):
    out, log = tmp_path / "run", tmp_path / "stderr"
    with open(log, "w") as file:
        processes = launch_two(out, "recpo", {**QUIET, "max_steps": 2}, before=FAILS, stderr=file)
        assert processes[1].wait(timeout=240) == 1
    text = text_of(processes[0], log)
    assert "PeerError: micro-batches: process 1 failed (ValueError: planted)" in text


def test_a_process_that_dies_ends_the_others_and_the_run_resumes(tmp_path):
    out, log = tmp_path / "run", tmp_path / "stderr"
    with open(log, "w") as file:
        processes = launch_two(out, "recpo", ENDLESS, stderr=file)
    wait_for(out / "checkpoint-2", processes)
    processes[1].kill()
    text = text_of(processes[0], log)
    assert "PeerError: another process of the run died" in text
    assert "resume_from_checkpoint=latest" in text
    last = checkpoint.checkpoints(out)[-1]
    step = json.loads((last / checkpoint.STATE_FILE).read_text())["step"]
    more = {**QUIET, "max_steps": step + 1, "resume_from_checkpoint": "latest"}
    processes = launch_two(out, "recpo", more)
    assert [p.wait(timeout=240) for p in processes] == [0, 0]
    assert lines(out)[-1]["step"] == step + 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_hangs_ends_the_others_in_time(tmp_path):
    out, log = tmp_path / "run", tmp_path / "stderr"
    with open(log, "w") as file:
        processes = launch_two(out, "recpo", {**ENDLESS, "ddp_timeout": 40}, stderr=file)
    wait_for(out / "checkpoint-2", processes)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        text = text_of(processes[0], log)
    finally:
        processes[1].kill()
    assert "did not answer within ddp_timeout seconds" in text


def test_sigterm_to_one_process_ends_all_with_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    processes = launch_two(out, "recpo", {**ENDLESS, "save_steps": 0})
    wait_for(out / "metrics.jsonl", processes, '"step": 2')
    processes[1].send_signal(signal.SIGTERM)
    assert [p.wait(timeout=240) for p in processes] == [0, 0]
    (saved,) = checkpoint.checkpoints(out)
    assert json.loads((saved / checkpoint.STATE_FILE).read_text())["step"] >= 2


def tree_of(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_new_run_does_not_touch_the_results_of_an_earlier_one(tmp_path):
    run(tmp_path, max_steps=4)
    before = tree_of(tmp_path)
    with pytest.raises(ValueError, match=r"output_dir: .* results of another run \(checkpoint-2"):
        run(tmp_path, max_steps=3, save_steps=1, learning_rate=1e-5)
    assert tree_of(tmp_path) == before


def test_another_runs_checkpoints_are_neither_latest_nor_pruned(tmp_path):
    run(tmp_path / "one", max_steps=4)
    run(tmp_path / "two", max_steps=2)
    shutil.copytree(tmp_path / "one" / "checkpoint-4", tmp_path / "two" / "checkpoint-9")
    with pytest.raises(ValueError, match=r"output_dir: .* results of another run"):
        start = tmp_path / "two" / "checkpoint-2"
        run(tmp_path / "two", max_steps=6, resume_from_checkpoint=str(start))
    assert (tmp_path / "two" / "checkpoint-9").is_dir()
    checkpoint.prune_checkpoints(tmp_path / "two", 1, "a run that wrote none of them")
    assert (tmp_path / "two" / "checkpoint-2").is_dir()


def test_going_back_keeps_the_later_checkpoints_aside(tmp_path):
    run(tmp_path, max_steps=6, save_total_limit=3)
    (tmp_path / "checkpoint-4" / "notes.txt").write_text("a user's")
    start = str(tmp_path / "checkpoint-2")
    run(tmp_path, max_steps=4, resume_from_checkpoint=start, save_total_limit=1)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"aside-1-checkpoint-4", "aside-1-checkpoint-6", "checkpoint-4"} <= names
    assert (tmp_path / "aside-1-checkpoint-4" / "notes.txt").read_text() == "a user's"
    assert checkpoint.checkpoints(tmp_path)[-1].name == "checkpoint-4"


def test_pruning_keeps_a_users_files(tmp_path):
    run(tmp_path, max_steps=2)
    (tmp_path / "checkpoint-2" / "notes.txt").write_text("a user's")
    run(tmp_path, max_steps=6, resume_from_checkpoint="latest", save_total_limit=1)
    assert [p.name for p in (tmp_path / "checkpoint-2").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"learning_rate": 1e-6}, 1e-6),
        ({"learning_rate": 1e-6, "lr_scheduler_type": "linear"}, 1e-6 * 3 / 6),
        ({"warmup_steps": 6}, 3e-3 * 3 / 6),
        ({}, 3e-3),
    ],
)
def test_resume_takes_the_new_rate(tmp_path, changes, rate):
    run(tmp_path, max_steps=3, save_steps=3)
    run(tmp_path, max_steps=6, resume_from_checkpoint="latest", **changes)
    found = {line["step"]: line for line in lines(tmp_path) if "learning_rate" in line}
    assert found[4]["learning_rate"] == pytest.approx(rate)


@pytest.mark.parametrize(
    ("changes", "old", "new"),
    [({"lora_r": 8}, "4", "8"), ({"use_lora": False}, "True", "False")],
)
def test_resume_with_another_kind_of_adapter_names_both(tmp_path, changes, old, new):
    run(tmp_path, max_steps=2)
    for wanted in ("latest", str(tmp_path / "checkpoint-2")):
        with pytest.raises(checkpoint.CheckpointError) as caught:
            run(tmp_path, max_steps=4, resume_from_checkpoint=wanted, **changes)
        text = str(caught.value)
        [name] = changes
        assert text.startswith(f"{name}: ") and f"{old}, " in text and f" {new};" in text
        assert "damaged" not in text


def test_logs_that_are_there_are_put_aside(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("a user's\n")
    run(tmp_path, max_steps=2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / f"aside-1-{name}").read_text() == "a user's\n"
    assert lines(tmp_path)[0]["counted_tokens"] > 0

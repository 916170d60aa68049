"""The training loop: what must not change its result, and what must."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import toy_dataset, toy_model

from r2ec_fast.checkpoint import TRAINABLE_FILE, load_checkpoint, trainable_parameters
from r2ec_fast.config import RecPOConfig
from r2ec_fast.trainer import RecPOTrainer

RUN = {
    "num_generations": 2,
    "max_completion_length": 5,
    "temperature": 1.2,
    "top_k": 0,
    "learning_rate": 3e-3,
    "warmup_steps": 0,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "refresh_steps": 3,
    "lora_alpha": 8,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Bit equality with the processes of these tests, which use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(directory: Path, objective: str = "recpo", **changes) -> tuple[dict, dict]:
    """Final metrics and trained parameters of a toy run."""
    settings = {**RUN, "output_dir": str(directory), "objective": objective, **changes}
    trainer = RecPOTrainer(toy_model(), toy_dataset(), RecPOConfig(**settings))
    metrics = trainer.train()
    return metrics, {n: p.detach().clone() for n, p in trainer.parameters.items()}


def lines(directory: Path) -> list[dict]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.endswith("_time")} for r in records]


def same(first: dict, second: dict, **tolerance) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


@pytest.mark.parametrize("objective", ["recpo", "contrastive"])
def test_same_seed_same_run(tmp_path, objective):
    metrics, parameters = run(tmp_path / "a", objective)
    again, same_parameters = run(tmp_path / "b", objective)
    assert metrics == again
    same(parameters, same_parameters, rtol=0, atol=0)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    _, others = run(tmp_path / "c", objective, seed=7)
    assert any(not torch.equal(parameters[n], others[n]) for n in parameters)


@pytest.mark.parametrize("objective", ["recpo", "contrastive"])
def test_accumulation_equals_one_batch(tmp_path, objective):
    _, whole = run(tmp_path / "a", objective, per_device_train_batch_size=8)
    _, parts = run(
        tmp_path / "b", objective, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    same(whole, parts, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["recpo", "contrastive"])
def test_resume_equals_never_stopped(tmp_path, objective):
    metrics, parameters = run(tmp_path / "whole", objective)
    # a run that ends after three steps has a checkpoint of step 2 and of step 3
    run(tmp_path / "cut", objective, max_steps=3)
    resumed, same_parameters = run(
        tmp_path / "cut",
        objective,
        resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"),
    )
    assert metrics == resumed
    same(parameters, same_parameters, rtol=0, atol=0)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_full_weights_train_without_the_token_table(tmp_path):
    _, parameters = run(tmp_path, use_lora=False, max_steps=1)
    assert not any("embed" in name or "lm_head" in name for name in parameters)
    assert any("mlp" in name for name in parameters)


def test_several_iterations_use_the_rollouts_again(tmp_path):
    run(tmp_path, num_iterations=3, max_steps=2, learning_rate=3e-2)
    assert lines(tmp_path)[0]["clip_ratio/region_mean"] > 0


def test_early_stop_and_best_checkpoint(tmp_path):
    metrics, _ = run(
        tmp_path, max_steps=40, eval_steps=1, early_stopping_patience=2, learning_rate=1e-9
    )
    steps = [r["step"] for r in lines(tmp_path) if "eval_valid_ndcg@10" in r]
    assert steps == [1, 2, 3]
    best = json.loads((tmp_path / "best" / "trainer_state.json").read_text())
    assert best["step"] == 1
    assert best["best"] == metrics


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run(tmp_path, max_steps=2)
    broken = tmp_path / "checkpoint-2" / TRAINABLE_FILE
    broken.write_bytes(broken.read_bytes()[:-100])
    trainer = RecPOTrainer(toy_model(), toy_dataset(), RecPOConfig(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="trainable.safetensors: damaged"):
        load_checkpoint(tmp_path / "checkpoint-2", trainer.model)
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint"):
        load_checkpoint(tmp_path / "nowhere", trainer.model)


SCRIPT = """
import os
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from test_trainer import run
torch.set_num_threads(1)
metrics, parameters = run(Path({out!r}), {objective!r}, **{changes!r})
torch.save((metrics, parameters), {out!r} + f"/result-{{os.environ.get('RANK', 0)}}.pt")
"""


def launch(out: Path, objective: str, changes: dict, rank: int = 0, size: int = 1, port: int = 0):
    out.mkdir(exist_ok=True)
    code = SCRIPT.format(
        tests=str(Path(__file__).parent), out=str(out), objective=objective, changes=changes
    )
    environment = dict(os.environ)
    if size > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("objective", ["recpo", "contrastive"])
def test_two_processes_equal_one(tmp_path, objective):
    changes = {"max_steps": 2, "eval_steps": 0}
    metrics, parameters = run(tmp_path / "one", objective, **changes, per_device_train_batch_size=8)
    port = free_port()
    out = tmp_path / "two"
    processes = [launch(out, objective, changes, rank, 2, port) for rank in range(2)]
    assert [p.wait(timeout=240) for p in processes] == [0, 0]
    results = [torch.load(out / f"result-{rank}.pt") for rank in range(2)]
    for got_metrics, got_parameters in results:
        assert got_metrics == pytest.approx(metrics)
        same(parameters, got_parameters, rtol=1e-5, atol=1e-7)


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    import time

    out = tmp_path / "run"
    process = launch(out, "recpo", {"max_steps": 10_000, "eval_steps": 0, "save_steps": 0})
    log = out / "metrics.jsonl"
    for _ in range(600):
        if log.is_file() and log.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    (checkpoint,) = out.glob("checkpoint-*")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["step"] >= 2


def test_kill_in_the_middle_then_resume(tmp_path):
    import time

    metrics, parameters = run(tmp_path / "whole", max_steps=6)
    out = tmp_path / "killed"
    process = launch(out, "recpo", {"max_steps": 6})
    while not (out / "checkpoint-2").is_dir():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    resumed, same_parameters = run(out, max_steps=6, resume_from_checkpoint="latest")
    assert resumed == metrics
    same(parameters, same_parameters, rtol=0, atol=0)
    assert lines(out) == lines(tmp_path / "whole")


def test_output_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output_dir: cannot write to"):
        run(tmp_path / "file" / "run")


def test_settings_are_checked():
    with pytest.raises(ValueError, match="objective: expected one of recpo, contrastive"):
        RecPOConfig(objective="dpo")
    with pytest.raises(ValueError, match="relabel_topk: expected at most num_generations"):
        RecPOConfig(relabel_topk=9)
    with pytest.raises(ValueError, match="temperature: expected more than 0"):
        RecPOConfig(temperature=0)


def test_trainable_parameters_have_a_fixed_order():
    model = toy_model()
    assert list(trainable_parameters(model)) == sorted(trainable_parameters(model))

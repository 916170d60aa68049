"""The training loop: what must not change its result, and what must."""

import json
import signal
import time

import pytest
import torch
from _support.toy import toy_dataset, toy_model
from _support.training import OBJECTIVES, RUN, launch, lines, run, same, two

from r2ec_fast.config import RecPOConfig
from r2ec_fast.train.checkpoint import TRAINABLE_FILE, load_checkpoint, trainable_parameters
from r2ec_fast.train.trainer import RecPOTrainer


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_same_seed_same_run(tmp_path, objective):
    metrics, parameters = run(tmp_path / "a", objective)
    again, same_parameters = run(tmp_path / "b", objective)
    assert metrics == again
    same(parameters, same_parameters, rtol=0, atol=0)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    _, others = run(tmp_path / "c", objective, seed=7)
    assert any(not torch.equal(parameters[n], others[n]) for n in parameters)


@pytest.mark.parametrize("objective", ["recpo", "contrastive"])
def test_on_step_sees_every_record(tmp_path, objective):
    seen = []
    config = RecPOConfig(**{**RUN, "output_dir": str(tmp_path), "objective": objective})
    RecPOTrainer(toy_model(), toy_dataset(), config, on_step=seen.append).train()
    assert [record["step"] for record in seen] == [1, 2, 3, 4]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(record in logged for record in seen)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_accumulation_equals_one_batch(tmp_path, objective):
    _, whole = run(tmp_path / "a", objective, per_device_train_batch_size=8)
    _, parts = run(
        tmp_path / "b", objective, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    same(whole, parts, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_recomputed_activations_train_the_same(tmp_path, objective):
    _, kept = run(tmp_path / "a", objective, max_steps=3)
    _, recomputed = run(tmp_path / "b", objective, max_steps=3, gradient_checkpointing=True)
    same(recomputed, kept, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
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


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
def test_resume_goes_on_with_the_learning_rate_of_its_step(tmp_path, schedule):
    changes = {"lr_scheduler_type": schedule, "warmup_steps": 3, "max_steps": 6}
    changes |= {"save_total_limit": 3, "load_best_model_at_end": False}
    metrics, parameters = run(tmp_path / "whole", **changes)
    for step in (2, 4):  # inside the warm-up, and after it
        out = tmp_path / str(step)
        wanted = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed, same_parameters = run(out, **changes, resume_from_checkpoint=wanted)
        assert metrics == resumed
        same(parameters, same_parameters, rtol=0, atol=0)


def test_resume_into_another_directory_takes_the_best_checkpoint_along(tmp_path, caplog):
    changes = {"eval_steps": 1, "learning_rate": 1e-9, "save_total_limit": 9}  # best: step 1
    metrics, parameters = run(tmp_path / "whole", **changes, max_steps=4)
    wanted = str(tmp_path / "whole" / "checkpoint-2")
    resume = {**changes, "max_steps": 4, "resume_from_checkpoint": wanted}
    resumed, same_parameters = run(tmp_path / "branch", **resume)
    assert resumed == metrics
    same(parameters, same_parameters, rtol=0, atol=0)
    assert best_step(tmp_path / "branch") == best_step(tmp_path / "whole") == 1

    # the other run found a better one since: its best is not the one of before checkpoint 2
    state = tmp_path / "whole" / "best" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best": {"later": 1.0}}))
    assert "chosen anew" not in caplog.text
    run(tmp_path / "other", **resume)
    assert "the best is chosen anew from here on" in caplog.text
    assert best_step(tmp_path / "other") == 3


def best_step(run_dir):
    return json.loads((run_dir / "best" / "trainer_state.json").read_text())["step"]


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


@pytest.mark.parametrize(
    ("objective", "mode"),
    [("recpo", "full"), ("contrastive", "full"), ("reasoning_sft", "full"), ("recpo", "rolling")],
)
def test_two_processes_equal_one(tmp_path, objective, mode):
    changes = {"max_steps": 2, "eval_steps": 0, "refresh_mode": mode}
    metrics, parameters = run(tmp_path / "one", objective, **changes, per_device_train_batch_size=8)
    for got_metrics, got_parameters in two(tmp_path / "two", objective, changes):
        assert got_metrics == pytest.approx(metrics)
        same(parameters, got_parameters, rtol=1e-5, atol=1e-7)


def test_bnpo_takes_a_process_as_it_takes_an_accumulation_step(tmp_path):
    changes = {"max_steps": 2, "eval_steps": 0, "loss_type": "bnpo"}
    _, parameters = run(tmp_path / "one", **changes, gradient_accumulation_steps=2)
    for _, got in two(tmp_path / "two", "recpo", changes):
        same(parameters, got, rtol=1e-5, atol=1e-7)


def test_sigterm_saves_and_exits_cleanly(tmp_path):
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
    with pytest.raises(
        ValueError, match="objective: expected one of recpo, contrastive, reasoning_sft"
    ):
        RecPOConfig(objective="dpo")
    with pytest.raises(ValueError, match="relabel_topk: expected at most num_generations"):
        RecPOConfig(relabel_topk=9)
    with pytest.raises(ValueError, match="temperature: expected more than 0"):
        RecPOConfig(temperature=0)


def test_trainable_parameters_have_a_fixed_order():
    model = toy_model()
    assert list(trainable_parameters(model)) == sorted(trainable_parameters(model))

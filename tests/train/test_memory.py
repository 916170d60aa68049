"""Memory that runs out in a step: smaller micro-batches on every process, the same result."""

import json

import pytest
import torch
from _support.training import OBJECTIVES, lines, run, same, toy_trainer, two

from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.train.fault_tolerance import StepOutOfMemory, TokenBudget, together
from r2ec_fast.utils.memory import is_out_of_memory

# a device that holds so many tokens of a pass with gradient; the toy's groups have 40 to 80
LIMIT = 170
RUN = {"max_steps": 2, "eval_steps": 0, "max_tokens_per_microbatch": 600}
PLANTED = f"""
from r2ec_fast.model.r2ec import R2ecModel
forward = R2ecModel.forward
def limited(self, batch, prefix=None):
    if torch.is_grad_enabled() and batch.input_ids.numel() > {LIMIT}:
        raise torch.OutOfMemoryError("planted")
    return forward(self, batch, prefix)
if os.environ["RANK"] == "1":
    R2ecModel.forward = limited
"""


def limit_memory(monkeypatch, tokens, error=torch.OutOfMemoryError):
    forward = R2ecModel.forward

    def limited(self, batch, prefix=None):
        if torch.is_grad_enabled() and batch.input_ids.numel() > tokens:
            raise error("planted")
        return forward(self, batch, prefix)

    monkeypatch.setattr(R2ecModel, "forward", limited)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_without_memory_is_done_again_in_smaller_parts(
    tmp_path, objective, monkeypatch, caplog
):
    _, whole = run(tmp_path / "whole", objective, **RUN)
    _, small = run(tmp_path / "small", objective, **RUN | {"max_tokens_per_microbatch": 150})
    limit_memory(monkeypatch, LIMIT)
    _, parameters = run(tmp_path / "planted", objective, **RUN)
    same(parameters, small, rtol=0, atol=0)
    same(parameters, whole, rtol=1e-4, atol=1e-6)
    records = lines(tmp_path / "planted")
    assert [r["memory/oom_retries"] for r in records if "grad_norm" in r] == [2, 0]
    assert records[0]["memory/token_budget"] == 150
    assert "process 0 ran out of memory (OutOfMemoryError: planted)" in caplog.text
    assert "micro-batches of 150 tokens on all processes" in caplog.text


def test_one_process_without_memory_makes_all_processes_use_smaller_parts(tmp_path):
    want = two(tmp_path / "whole", "recpo", RUN)
    got = two(tmp_path / "planted", "recpo", RUN, before=PLANTED)
    for (metrics, parameters), (want_metrics, want_parameters) in zip(got, want, strict=True):
        assert metrics == pytest.approx(want_metrics)
        same(parameters, want_parameters, rtol=1e-4, atol=1e-6)
    same(got[0][1], got[1][1], rtol=0, atol=0)
    first, second = (r for r in lines(tmp_path / "planted") if "reward" in r)
    assert (first["memory/oom_retries"], second["memory/oom_retries"]) == (2, 0)
    assert first["memory/token_budget"] == second["memory/token_budget"] == 150
    state = tmp_path / "planted" / "checkpoint-2" / "trainer_state.json"
    assert json.loads(state.read_text())["token_budget"] == 150


def test_a_resumed_run_keeps_the_smaller_budget(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        limit_memory(patch, LIMIT)
        run(tmp_path, **RUN)
    trainer = toy_trainer(tmp_path, **RUN, resume_from_checkpoint="latest")
    trainer.train()
    assert trainer.update.budget.tokens == 150


def test_what_cannot_be_divided_names_the_setting_to_lower(tmp_path, monkeypatch):
    limit_memory(monkeypatch, 40)
    with pytest.raises(StepOutOfMemory, match="group of .* does not fit alone; lower num_gen"):
        run(tmp_path / "group", **RUN, per_device_train_batch_size=1)
    limit_memory(monkeypatch, 3)
    with pytest.raises(StepOutOfMemory, match="target items do not fit.*lower per_device_train"):
        run(tmp_path / "item", **RUN)


def test_a_rollout_without_memory_is_done_in_smaller_batches(tmp_path, monkeypatch, caplog):
    from r2ec_fast.rollout.shared_prompt.decoder import SharedPromptDecoder

    _, want = run(tmp_path / "whole", **RUN)
    start = SharedPromptDecoder.start

    def limited(self, prompts, *rest):
        if len(prompts) > 1:
            raise MemoryError("planted")
        return start(self, prompts, *rest)

    monkeypatch.setattr(SharedPromptDecoder, "start", limited)
    _, parameters = run(tmp_path / "planted", **RUN)
    same(parameters, want, rtol=1e-4, atol=1e-6)
    assert "max_tokens_in_flight" in caplog.text

    def full(self, prompts, *rest):
        raise MemoryError("planted")

    monkeypatch.setattr(SharedPromptDecoder, "start", full)
    with pytest.raises(StepOutOfMemory, match="rollout of one prompt.*lower num_generations"):
        run(tmp_path / "full", **RUN)


def test_a_second_attempt_draws_the_same_dropout():
    drawn = []

    def attempt():
        drawn.append(torch.rand(3))
        if len(drawn) == 1:
            with together("work"):
                raise torch.OutOfMemoryError("planted")

    budget = TokenBudget(8)
    assert budget.spend(attempt, lambda: None) == (None, 1)
    torch.testing.assert_close(*drawn, rtol=0, atol=0)
    assert budget.tokens == 4


def test_errors_that_say_that_memory_is_full():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**50)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))

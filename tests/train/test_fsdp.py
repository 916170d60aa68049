"""FSDP2 over two CPU processes equals one process, and its checkpoints are everybody's."""

import pytest
import torch
from _support.toy import toy_model
from _support.training import run, same, toy_trainer, two
from safetensors.torch import load_file

from r2ec_fast.config import RecPOConfig
from r2ec_fast.train import fsdp

RUN = {"max_steps": 2, "eval_steps": 0}
ONE = {"max_steps": 4, "eval_steps": 2, "per_device_train_batch_size": 8}
TWO = {"max_steps": 4, "eval_steps": 2, "fsdp": True}

FLOAT32 = """
import functools
from _support import training
training.toy_model = functools.partial(training.toy_model, dtype=torch.float32)
"""


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("recpo", {}),
        # one group a pass: the processes' numbers of passes differ
        ("recpo", {"max_tokens_per_microbatch": 1, "beta": 0.1, "use_lora": True}),
        pytest.param(
            *("recpo", {"use_lora": False, "num_iterations": 2, "learning_rate": 1e-3}),
            marks=pytest.mark.slow,
        ),
        pytest.param(*("contrastive", {"max_tokens_per_microbatch": 100}), marks=pytest.mark.slow),
        pytest.param(
            *("reasoning_sft", {"max_tokens_per_microbatch": 100}), marks=pytest.mark.slow
        ),
    ],
)
def test_two_sharded_processes_equal_one(tmp_path, objective, changes):
    metrics, parameters = run(
        tmp_path / "one", objective, **{**RUN, **changes}, per_device_train_batch_size=8
    )
    settings = {**RUN, **changes, "fsdp": True}
    for got_metrics, got_parameters in two(tmp_path / "two", objective, settings):
        assert got_metrics == pytest.approx(metrics)
        same(parameters, got_parameters, rtol=1e-5, atol=1e-7)
    assert saved(tmp_path / "two") == saved(tmp_path / "one")


@pytest.mark.slow
def test_float32_is_sharded_too(tmp_path):
    _, parameters = run(tmp_path / "one", "contrastive", **RUN, per_device_train_batch_size=8)
    settings = {**RUN, "fsdp": True}
    for _, got in two(tmp_path / "two", "contrastive", settings, before=FLOAT32):
        same(parameters, got, rtol=1e-2, atol=1e-3, check_dtype=False)


def saved(out) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the exported weights."""
    (file,) = (out / "model").glob("*model.safetensors")
    return {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_a_checkpoint_of_sharded_processes_resumes_in_one(tmp_path):
    metrics, parameters = run(tmp_path / "one", **ONE)
    two(tmp_path / "two", "recpo", {**TWO, "max_steps": 2})
    resumed, got = run(tmp_path / "two", **ONE, resume_from_checkpoint="latest")
    assert resumed == pytest.approx(metrics)
    same(parameters, got, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_resumes_in_sharded_ones(tmp_path):
    metrics, parameters = run(tmp_path / "one", **ONE)
    run(tmp_path / "two", **ONE | {"max_steps": 2})
    settings = {**TWO, "resume_from_checkpoint": "latest"}
    for got_metrics, got in two(tmp_path / "two", "recpo", settings):
        assert got_metrics == pytest.approx(metrics)
        same(parameters, got, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_sharded_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="fsdp: expected several processes"):
        toy_trainer(tmp_path, fsdp=True)
    with pytest.raises(ValueError, match="TransformersEngine alone, got str"):
        toy_trainer(tmp_path, fsdp=True, engine="vllm")
    with pytest.raises(ValueError, match="optim: fsdp needs 'adamw_torch'"):
        toy_trainer(tmp_path, fsdp=True, optim="paged_adamw_8bit")
    with pytest.raises(ValueError, match="train_embeddings: fsdp leaves the token tables"):
        toy_trainer(tmp_path, fsdp=True, use_lora=False, train_embeddings=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed is not supported.*fsdp2.yaml"):
        toy_trainer(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="expected fsdp_version 2, got 1"):
        toy_trainer(tmp_path)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert fsdp.wanted(RecPOConfig(), None)


def test_an_unsharded_model_is_left_alone():
    model = toy_model()
    with fsdp.gathered(model):
        assert model.read_out([[5, 6]]).requires_grad
    tensor = torch.ones(2)
    assert fsdp.whole(tensor) is tensor

import numpy as np
import pytest
import torch
from _support.backbones import KINDS
from _support.rollout_cases import random_prompts
from peft import LoraConfig, get_peft_model

from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.rollout import TransformersEngine, score_rollouts


@pytest.mark.parametrize("name", [name for name in KINDS if name != "mistral"])
@pytest.mark.parametrize("max_tokens", [1, 80, 4096])
def test_packed_score_equals_what_the_engine_returned(make_model, tokenizer, name, max_tokens):
    backbone = make_model(name)
    engine = TransformersEngine(backbone, tokenizer, "b>")
    prompts = random_prompts([9, 4, 13, 2])
    out = engine.generate(
        prompts,
        user_keys=range(4),
        num_generations=3,
        max_completion_length=8,
        temperature=1.4,
        top_k=6,
    )
    model = R2ecModel(backbone, tokenizer).train()
    scored = score_rollouts(model, prompts, out, temperature=1.4, max_tokens=max_tokens)
    assert model.training
    assert scored.dtype == np.float32
    np.testing.assert_allclose(scored, out.log_prob, atol=2e-6, rtol=1e-6)
    other = score_rollouts(model, prompts, out, temperature=1.0, max_tokens=max_tokens)
    assert np.abs(other - scored).max() > 1e-3


def test_score_sees_the_adapter_without_its_dropout(make_model, tokenizer):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["v_proj"], init_lora_weights=False)
    backbone = get_peft_model(make_model("qwen2"), lora).train()
    engine = TransformersEngine(backbone, tokenizer, "b>")
    prompts = random_prompts([5, 3])
    out = engine.generate(
        prompts, user_keys=[0, 1], num_generations=2, max_completion_length=6, temperature=1.1
    )
    model = R2ecModel(backbone, tokenizer)
    scored = score_rollouts(model, prompts, out, temperature=1.1)
    np.testing.assert_allclose(scored, out.log_prob, atol=2e-6, rtol=1e-6)
    with backbone.disable_adapter():
        plain = score_rollouts(model, prompts, out, temperature=1.1)
    assert np.abs(plain - scored).max() > 1e-3


def test_no_prompts_no_scores(make_model, tokenizer):
    backbone = make_model("llama")
    engine = TransformersEngine(backbone, tokenizer, "b>")
    out = engine.generate([], user_keys=[], num_generations=2, max_completion_length=4)
    model = R2ecModel(backbone, tokenizer)
    assert score_rollouts(model, [], out, temperature=1.0).shape == (0,)

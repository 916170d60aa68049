"""Rows longer than a model reads, and rotary frequencies that follow a row's length."""

from __future__ import annotations

import pytest
import torch
import transformers
from _support.backbones import SIZES
from _support.tiny_tokenizer import tiny_tokenizer
from _support.toy import toy_dataset, toy_model

from r2ec_fast.model import R2ecModel
from r2ec_fast.model.hf_compat import context_limit
from r2ec_fast.rollout import TransformersEngine


def rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 60, (n,), generator=generator).tolist() for n in lengths]


def model_with(**changes) -> R2ecModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **changes})
    backbone = transformers.AutoModelForCausalLM.from_config(config).double()
    return R2ecModel(backbone, tiny_tokenizer(), temperature=0.1)


def test_a_row_beyond_the_context_is_refused_in_direct_mode():
    model = model_with(max_position_embeddings=64)
    assert model.read_out(rows(64)).shape[0] == 1
    for lengths in ((65,), (5, 192, 7), (192, 192)):
        with pytest.raises(ValueError, match="rows: expected at most 64 tokens"):
            model.read_out(rows(*lengths))


def test_items_and_reasonings_beyond_the_context_are_refused():
    model = model_with(max_position_embeddings=24)
    with pytest.raises(ValueError, match="rows: expected at most 24 tokens"):
        model.encode_items(toy_dataset().data.catalog)
    engine = TransformersEngine(model.backbone, model.tokenizer)
    with pytest.raises(ValueError, match="exceeds the model's 24 positions"):
        engine.generate(
            rows(20), user_keys=[0], num_generations=1, max_completion_length=5, seed=0, step=0
        )


def test_shared_prompts_count_the_prompt():
    model = model_with(max_position_embeddings=64)
    [prompt] = rows(60)
    tails = rows(3, 5)
    with pytest.raises(ValueError, match="got one of 65"):
        model.read_out([prompt + tail for tail in tails])


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 32,
}
DYNAMIC = {
    "rope_type": "dynamic",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("rope", [LONG, DYNAMIC], ids=["longrope", "dynamic"])
def test_a_short_row_does_not_depend_on_a_long_one(rope):
    model = model_with(max_position_embeddings=128, rope_parameters=rope)
    assert context_limit(model.language_model.config) == 32
    short, long = rows(10, 32)
    alone = model.read_out([short])
    beside = model.read_out([short, long])
    torch.testing.assert_close(beside[:1], alone, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="rows: expected at most 32 tokens"):
        model.read_out([short, *rows(33)])


def test_other_models_keep_their_limit():
    assert context_limit(toy_model().language_model.config) == 512

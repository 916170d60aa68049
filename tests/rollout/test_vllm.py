"""VLLMEngine: its bookkeeping against a stand-in for vLLM, and (mark vllm) the real one."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from _support.rollout_cases import EOS, PIECES, random_prompts

from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.rollout import TransformersEngine, VLLMEngine, score_rollouts

MARKER = "b>"
A, B, CLOSE = (1 + PIECES.index(piece) for piece in ("a", "b", ">"))


class StandIn:
    """Answers every request with the same three completions, out of order."""

    def __init__(self, mode: str = "processed_logprobs") -> None:
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(logprobs_mode=mode))
        self.calls: list[tuple] = []

    def generate(self, requests, settings, lora_request, use_tqdm):
        self.calls.append((requests, settings, lora_request))
        rows = [(2, [A, A, A]), (0, [A, B, CLOSE]), (1, [A, EOS])]
        outputs = [
            SimpleNamespace(
                index=index,
                token_ids=tokens,
                logprobs=[{t: SimpleNamespace(logprob=-0.5 - i)} for i, t in enumerate(tokens)],
            )
            for index, tokens in rows
        ]
        return [SimpleNamespace(outputs=outputs) for _ in requests]


@pytest.fixture
def stand_in(monkeypatch):
    module = ModuleType("vllm")
    module.SamplingParams = lambda **settings: SimpleNamespace(**settings)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return StandIn()


ARGUMENTS = {"user_keys": [7, 8], "num_generations": 3, "max_completion_length": 3}


def test_completions_become_rows(stand_in, tokenizer):
    engine = VLLMEngine(stand_in, tokenizer, MARKER)
    out = engine.generate([[A], [B, A]], **ARGUMENTS, temperature=1.5, seed=1, step=2)
    marker = tokenizer.encode(MARKER)
    rows = [[A, B, CLOSE], [A, *marker], [A, A, A, *marker]]
    assert [out.row(r).tolist() for r in range(6)] == rows * 2
    assert out.finish_reason == ["answer", "eos", "length"] * 2
    n = len(marker)
    expected = [-0.5, -1.5, -2.5, -0.5, *[0] * n, -0.5, -1.5, -2.5, *[0] * n]
    np.testing.assert_allclose(out.log_prob, expected * 2)
    assert out.sampled.sum() == 14
    requests, settings, lora = stand_in.calls[0]
    assert [r["prompt_token_ids"] for r in requests] == [[A], [B, A]]
    assert lora is None
    assert {(s.n, s.temperature, s.top_k, s.max_tokens, s.logprobs) for s in settings} == {
        (3, 1.5, 0, 3, 0)
    }
    assert settings[0].stop == [MARKER] and settings[0].include_stop_str_in_output
    assert settings[0].stop_token_ids == [EOS]


def test_seeds_come_from_seed_step_and_user_alone(stand_in, tokenizer):
    engine = VLLMEngine(stand_in, tokenizer, MARKER)

    def seeds(keys, **key):
        engine.generate([[A]] * len(keys), **ARGUMENTS | {"user_keys": keys}, **key)
        return [s.seed for s in stand_in.calls[-1][1]]

    first = seeds([7, 8], seed=1, step=2)
    assert seeds([8, 7], seed=1, step=2) == first[::-1]
    assert len({*first, *seeds([7, 8], seed=2, step=2), *seeds([7, 8], seed=1, step=3)}) == 6
    engine.generate([[A]], **ARGUMENTS | {"user_keys": [7]}, greedy=True, top_k=9)
    settings = stand_in.calls[-1][1][0]
    assert (settings.temperature, settings.top_k, settings.seed) == (0.0, 0, None)


def test_a_scorer_replaces_truncated_log_probs(stand_in, tokenizer):
    with pytest.raises(ValueError, match="top_k=5 needs a scorer"):
        VLLMEngine(stand_in, tokenizer, MARKER).generate([[A], [B]], **ARGUMENTS, top_k=5)

    def scorer(prompts, rollouts, temperature):
        assert [prompt.tolist() for prompt in prompts] == [[A], [B]] and temperature == 1.5
        return np.arange(len(rollouts.values), dtype=np.float32)

    engine = VLLMEngine(stand_in, tokenizer, MARKER, scorer=scorer)
    out = engine.generate([[A], [B]], **ARGUMENTS, top_k=5, temperature=1.5)
    np.testing.assert_array_equal(out.log_prob, np.arange(len(out.values)))
    assert out.sampler_log_prob[:3].tolist() == [-0.5, -1.5, -2.5]


def test_wrong_set_ups_are_named(stand_in, tokenizer):
    with pytest.raises(ValueError, match="must be 'processed_logprobs', got 'raw_logprobs'"):
        VLLMEngine(StandIn("raw_logprobs"), tokenizer, MARKER)
    with pytest.raises(ValueError, match="policy must be a PeftModel with one active.*Linear"):
        VLLMEngine(stand_in, tokenizer, MARKER, policy=torch.nn.Linear(1, 1))
    engine = VLLMEngine(stand_in, tokenizer, MARKER)
    with pytest.raises(ValueError, match="2 prompts, 1 keys"):
        engine.generate([[A], [B]], **ARGUMENTS | {"user_keys": [1]})
    assert len(engine.generate([], **ARGUMENTS | {"user_keys": []})) == 0


def test_without_vllm_the_launch_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        VLLMEngine.launch("nowhere", max_model_length=8)


@pytest.fixture(scope="module")
def real(toy_policy, tokenizer):
    """A toy Llama with an adapter, and vLLM on the same base weights."""
    pytest.importorskip("vllm")
    folder, policy = toy_policy
    llm = VLLMEngine.launch(
        folder, max_model_length=128, max_lora_rank=4, dtype="float32", enforce_eager=True
    )
    return llm, R2ecModel(policy, tokenizer)


@pytest.mark.vllm
def test_real_log_probs_follow_the_adapter(real, tokenizer):
    llm, model = real
    engine = VLLMEngine(llm, tokenizer, MARKER, policy=model.backbone)
    prompts = random_prompts([9, 4, 13])
    arguments = {"user_keys": [1, 2, 3], "num_generations": 4, "max_completion_length": 12}
    differences = []
    for step in range(2):
        out = engine.generate(prompts, **arguments, temperature=1.5, step=step)
        exact = score_rollouts(model, prompts, out, temperature=1.5)
        differences.append(np.abs(out.log_prob - exact).max())
        with model.backbone.disable_adapter():
            without = score_rollouts(model, prompts, out, temperature=1.5)
        assert np.abs(out.log_prob - without).max() > 0.05  # the adapter is really in
        with torch.no_grad():
            for name, parameter in model.backbone.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-1.5)
    assert max(differences) < 1e-3


@pytest.mark.vllm
def test_real_top_k_is_renormalised_and_scored(real, tokenizer):
    llm, model = real

    def scorer(prompts, rollouts, temperature):
        return score_rollouts(model, prompts, rollouts, temperature=temperature)

    engine = VLLMEngine(llm, tokenizer, MARKER, policy=model.backbone, scorer=scorer)
    prompts = random_prompts([6, 8])
    arguments = {"user_keys": [4, 5], "num_generations": 4, "max_completion_length": 10}
    out = engine.generate(prompts, **arguments, temperature=1.5, top_k=3)
    exact = scorer(prompts, out, 1.5)
    np.testing.assert_array_equal(out.log_prob, exact)
    gap = (out.sampler_log_prob - out.log_prob)[out.sampled]
    assert gap.min() > -1e-3 and gap.max() > 0.05  # -log of the mass the top-k keeps
    again = engine.generate(
        prompts[::-1], **arguments | {"user_keys": [5, 4]}, temperature=1.5, top_k=3
    )
    assert again.row(0).tolist() == out.row(4).tolist()


@pytest.mark.vllm
def test_real_greedy_equals_the_transformers_engine(real, tokenizer):
    llm, model = real
    prompts = random_prompts([7, 3, 11, 5])
    arguments = {
        "user_keys": range(4),
        "num_generations": 1,
        "max_completion_length": 12,
        "greedy": True,
    }
    ours = TransformersEngine(model.backbone, tokenizer, MARKER).generate(prompts, **arguments)
    theirs = VLLMEngine(llm, tokenizer, MARKER, policy=model.backbone).generate(
        prompts, **arguments
    )
    assert theirs.values.tolist() == ours.values.tolist()
    assert theirs.finish_reason == ours.finish_reason

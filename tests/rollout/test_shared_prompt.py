"""The shared-prompt cache, the choice of decoder, and packed weights."""

import copy
import logging

import numpy as np
import pytest
import torch
from _support.backbones import KINDS, toy_config
from _support.rollout_cases import SIZES, random_prompts
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from r2ec_fast.model.hf_compat import eval_mode
from r2ec_fast.rollout import TransformersEngine, onednn_linear
from r2ec_fast.rollout.onednn_linear import packed_linears
from r2ec_fast.rollout.plain_decoder import PlainDecoder
from r2ec_fast.rollout.shared_prompt.cache import SharedPromptCache
from r2ec_fast.rollout.shared_prompt.decoder import SharedPromptDecoder
from r2ec_fast.rollout.transformers_engine import choose_decoder


def full_logits(model, tokens: list[int]) -> torch.Tensor:
    """[V] logits after `tokens`, by one eager pass without a cache."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    model.set_attn_implementation(before)
    return logits


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_finishing_rows_gives_the_full_pass_logits(make_model, name, seed):
    model = make_model(name)
    generator = torch.Generator().manual_seed(seed)
    prompts = random_prompts([11, 3, 7, 1], seed)
    samples, longest = 3, 9
    decoder = SharedPromptDecoder(model)
    rows = [(list(p), []) for p in prompts for _ in range(samples)]
    sizes = set()
    with torch.no_grad(), decoder.session():
        logits = decoder.start(prompts, samples, longest)
        for _ in range(longest):
            for (prompt, completion), got in zip(rows, logits, strict=True):
                expected = full_logits(model, prompt + completion)
                torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
            alive = (torch.rand(len(rows), generator=generator) > 0.2).nonzero().squeeze(-1)
            if len(alive) == 0:
                break
            tokens = torch.randint(1, 17, (len(alive),), generator=generator)
            keep = None if len(alive) == len(rows) else alive
            rows = [rows[i] for i in alive.tolist()]
            for (_, completion), token in zip(rows, tokens.tolist(), strict=True):
                completion.append(token)
            logits = decoder.step(tokens, keep)
            cache = decoder._cache
            sizes.add((cache.num_prompts, cache.num_samples, cache.slots is None))
    assert len(sizes) > 2  # the slots were repacked on the way, and rows died in between


def test_cache_memory_is_prompt_once_plus_suffixes():
    cache = SharedPromptCache([5, 9], num_samples=3, max_suffix=4)
    for index, length in enumerate((5, 9)):
        cache.prompt = index
        cache.update(torch.ones(1, 2, length, 8), torch.ones(1, 2, length, 8), 0)
    assert cache.prefix[0][0].shape == (2, 2, 9, 8)
    assert cache.suffix[0][0].shape == (6, 2, 4, 8)
    address = cache.suffix[0][0].data_ptr()
    for _ in range(4):
        cache.advance(None)
        cache.update(torch.ones(6, 2, 1, 8), torch.ones(6, 2, 1, 8), 0)
    assert cache.suffix[0][0].data_ptr() == address


def test_nothing_unwritten_is_read(make_model, monkeypatch):
    """Memory that was only allocated holds NaN; the results must not change."""
    model, prompts = make_model("gemma2"), random_prompts([6, 2, 9])

    def run():
        decoder = SharedPromptDecoder(model)
        with torch.no_grad(), decoder.session():
            decoder.start(prompts, 3, 5)
            decoder.step(torch.arange(1, 10), None)
            out = [decoder.step(torch.arange(1, 7), torch.tensor([0, 2, 3, 4, 5, 7]))]
            out.append(decoder.step(torch.arange(1, 4), torch.tensor([1, 2, 5])))
        return out

    expected = run()
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **k: plain(self, *size, **k).fill_(torch.nan)
    )
    for got, want in zip(run(), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("decoder", "cost"),
    [
        (SharedPromptDecoder, lambda longest: longest + 4 * 10),
        (PlainDecoder, lambda longest: 4 * (longest + 10)),
    ],
)
@pytest.mark.parametrize("budget", [1, 300, 1000, 10_000])
def test_batches_hold_every_prompt_once_within_the_budget(decoder, cost, budget):
    lengths = [5, 100, 7, 60, 60, 5, 90, 5]
    plan = list(decoder.batches(lengths, 4, 10, budget))
    assert sorted(i for batch in plan for i in batch) == list(range(8))
    spent = [cost(max(lengths[i] for i in batch)) * len(batch) for batch in plan]
    assert all(s <= budget or len(b) == 1 for s, b in zip(spent, plan, strict=True))
    kinds = len(set(lengths)) if decoder is PlainDecoder else 1
    assert len(plan) == {1: 8, 10_000: kinds}.get(budget, len(plan))
    if decoder is SharedPromptDecoder and budget == 300:
        # 2 x 140, then 3 x 100 (60, 60, 7), then 3 x 45
        assert plan == [[1, 6], [3, 4, 2], [0, 5, 7]]


def test_decoder_is_chosen_by_architecture_and_logged(make_model, tokenizer, caplog):
    assert choose_decoder(make_model("gemma2")) == "shared"
    assert choose_decoder(make_model("gemma2"), "plain") == "plain"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=17, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    gpt2 = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with caplog.at_level(logging.WARNING):
        engine = TransformersEngine(gpt2, tokenizer, "b>")
    assert engine.decoder == "plain"
    assert "plain decoder: model type 'gpt2'" in caplog.text
    with pytest.raises(ValueError, match="decoder 'shared' cannot run this model.*gpt2"):
        TransformersEngine(gpt2, tokenizer, "b>", decoder="shared")
    with pytest.raises(
        ValueError, match="decoder must be one of auto, shared, static, plain, got 'fast'"
    ):
        choose_decoder(gpt2, "fast")
    out = engine.generate(
        [[1, 2, 3], [4]], user_keys=[0, 1], num_generations=2, max_completion_length=5, greedy=True
    )
    for r in range(4):
        tokens = [[1, 2, 3], [4]][r // 2]
        for token in out.row(r)[out.sampled[out.offsets[r] : out.offsets[r + 1]]].tolist():
            with torch.no_grad():
                logits = gpt2(input_ids=torch.tensor([tokens])).logits[0, -1]
            assert logits.argmax().item() == token
            tokens = [*tokens, token]


@pytest.fixture
def wide_model():
    """Float32 Llama with layers large enough to be packed."""
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 320,
        "head_dim": 64,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
    }
    config = toy_config("llama", **SIZES | sizes, attention_bias=True, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def adapt(model: nn.Module, **settings: object) -> nn.Module:
    lora = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5, **settings
    )
    return get_peft_model(model, lora)


@pytest.mark.parametrize("kind", ["plain", "lora", "dora", "adapters off"])
def test_packed_layers_give_the_same_logits_and_are_removed(wide_model, kind, monkeypatch):
    torch.manual_seed(2)
    ran = []
    make = onednn_linear._packed

    def counted(weight, bias):
        product = make(weight, bias)
        return lambda x: ran.append(1) or product(x)

    monkeypatch.setattr(onednn_linear, "_packed", counted)
    model = wide_model
    if kind != "plain":
        model = adapt(model, use_dora=kind == "dora")
    if kind == "adapters off":
        model.base_model.disable_adapter_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 17, (3, 6))
    with torch.no_grad(), eval_mode(model):
        expected = model(input_ids=ids).logits
        with packed_linears(model, steps=onednn_linear.MIN_STEPS) as count:
            assert count == 14  # q k v o gate up down of two layers; the small head is left alone
            changed = [m for m in model.modules() if "forward" in m.__dict__]
            assert len(changed) == 14
            got = model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert len(ran) == 14  # the other code (which AVX512 gives the same bits as this one)
    assert not any("forward" in m.__dict__ for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU"
)
@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_layers_are_packed_and_their_adapters_run_beside(wide_model, lora):
    torch.manual_seed(2)
    model = wide_model.bfloat16()
    if lora:
        model = adapt(model).bfloat16()
    ids = torch.randint(0, 17, (3, 6))
    with torch.no_grad(), eval_mode(model):
        exact = copy.deepcopy(model).float()(input_ids=ids).logits
        error = (model(input_ids=ids).logits - exact).norm()
        with packed_linears(model, steps=64) as count:
            assert count == 14 and not any(onednn_linear._foldable(m) for m in model.modules())
            assert (model(input_ids=ids).logits - exact).norm() < 1.2 * error


def test_a_folded_adapter_is_the_current_one(wide_model):
    model = adapt(wide_model)
    ids = torch.randint(0, 17, (1, 4))
    with torch.no_grad(), eval_mode(model):
        with packed_linears(model, steps=64):
            first = model(input_ids=ids).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-2.0)
        with packed_linears(model, steps=64):
            second = model(input_ids=ids).logits
        torch.testing.assert_close(second, model(input_ids=ids).logits, atol=2e-5, rtol=2e-5)
    assert (first - second).abs().max() > 1e-2


def test_short_rollouts_and_other_types_are_not_packed(wide_model):
    with packed_linears(wide_model, steps=onednn_linear.MIN_STEPS - 1) as count:
        assert count == 0
    with packed_linears(wide_model.double(), steps=64) as count:
        assert count == 0
    with torch.autocast("cpu", torch.bfloat16), packed_linears(wide_model.float(), 64) as count:
        assert count == 0


@pytest.mark.parametrize("lora", [False, True])
def test_kept_copies_are_made_once_and_follow_the_weights(wide_model, tokenizer, lora):
    model = adapt(wide_model) if lora else wide_model
    engine = TransformersEngine(model, tokenizer, keep_packed=True)
    plain = TransformersEngine(model, tokenizer)
    request = {"user_keys": [3], "num_generations": 2, "max_completion_length": 5, "greedy": True}

    def same():
        got, right = engine.generate([[4, 5, 6]], **request), plain.generate([[4, 5, 6]], **request)
        np.testing.assert_array_equal(got.values, right.values)
        np.testing.assert_allclose(got.log_prob, right.log_prob, rtol=0, atol=2e-4)
        return {module: copy[1] for module, copy in engine._packed._made.items()}

    first, again = same(), same()
    assert len(first) == 14 and first == again
    changed = next(iter(first))
    with torch.no_grad():
        (changed.lora_B["default"].weight if lora else changed.weight).mul_(-1.5)
    after = same()
    assert [m for m in first if first[m] is not after[m]] == [changed]
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_packed_rollout_equals_the_full_pass(wide_model, tokenizer):
    model = adapt(wide_model)
    prompts = random_prompts([20, 14])
    engine = TransformersEngine(model, tokenizer, "b>", eos_token_ids=[])
    out = engine.generate(
        prompts, user_keys=[0, 1], num_generations=3, max_completion_length=40, temperature=1.5
    )
    model.eval()
    for r in range(6):
        prompt, row = prompts[r // 3], out.row(r)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *row]])).logits[0].double()
        log_prob = (logits[len(prompt) - 1 : -1] / 1.5).log_softmax(-1)
        expected = log_prob[torch.arange(len(row)), torch.as_tensor(row)].numpy()
        sampled = out.sampled[out.offsets[r] : out.offsets[r + 1]]
        got = out.log_prob[out.offsets[r] : out.offsets[r + 1]]
        np.testing.assert_allclose(got[sampled], expected[sampled], atol=2e-5, rtol=2e-5)

import copy

import numpy as np
import pytest
import torch
from _support.backbones import KINDS
from _support.rollout_cases import EOS, random_prompts
from peft import LoraConfig, get_peft_model

from r2ec_fast.packing import Ragged
from r2ec_fast.rollout import Rollouts, TransformersEngine

MARKER = "b>"
ARGUMENTS = {
    "user_keys": [5, 1, 8, 3],
    "num_generations": 3,
    "max_completion_length": 12,
    "temperature": 1.3,
    "top_k": 9,
    "seed": 2,
    "step": 4,
}


@pytest.fixture(params=["shared", "plain", "static"])
def decoder(request):
    return request.param


@pytest.fixture
def engine(make_model, tokenizer, decoder):
    return TransformersEngine(make_model("llama"), tokenizer, MARKER, decoder=decoder)


def full_forward_log_prob(model, prompt, completion, temperature):
    """log p of each completion token by one eager pass over prompt + completion, no cache."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    log_prob = (logits / temperature).log_softmax(-1)
    at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return log_prob[at, torch.as_tensor(completion)].numpy()


def assert_same(a: Rollouts, b: Rollouts):
    for name in ("values", "offsets", "sampled"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(a.log_prob, b.log_prob, rtol=1e-6, atol=1e-7)
    assert a.finish_reason == b.finish_reason


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_log_probs_equal_a_full_forward_pass(make_model, tokenizer, prompts, name, dtype, decoder):
    model = make_model(name, dtype)
    engine = TransformersEngine(model, tokenizer, MARKER, decoder=decoder)
    out = engine.generate(prompts, **ARGUMENTS)
    tolerance = 1e-6 if dtype == torch.float64 else 5e-5
    for r in range(len(out)):
        tokens = slice(out.offsets[r], out.offsets[r + 1])
        expected = full_forward_log_prob(model, prompts[r // 3], out.row(r), 1.3)
        expected = np.where(out.sampled[tokens], expected, 0.0)
        np.testing.assert_allclose(out.log_prob[tokens], expected, atol=tolerance, rtol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_states_are_those_of_a_full_forward_pass(make_model, tokenizer, name, decoder):
    model = make_model(name)
    engine = TransformersEngine(model, tokenizer, MARKER, decoder=decoder)
    prompts = random_prompts([7, 3, 9, 7, 5, 7, 4, 7])
    arguments = ARGUMENTS | {"user_keys": range(8), "top_k": 0, "max_completion_length": 6}
    plain = engine.generate(prompts, **arguments)
    out = engine.generate(prompts, **arguments, states=True)
    assert plain.states is None and not model.get_decoder()._forward_hooks
    assert_same(out, plain)
    assert set(out.finish_reason) == {"answer", "eos", "length"}
    model.set_attn_implementation("eager")
    for r, state in enumerate(out.states):
        ids = torch.tensor([[*prompts[r // 3], *out.row(r).tolist()]])
        with torch.no_grad():
            right = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(state, right, rtol=1e-5, atol=2e-5)


def test_states_need_room_for_the_marker(make_model, tokenizer, decoder):
    model = make_model("llama")
    engine = TransformersEngine(model, tokenizer, MARKER, decoder=decoder)
    limit = model.config.max_position_embeddings
    arguments = ARGUMENTS | {"user_keys": [0], "max_completion_length": limit - 5}
    with pytest.raises(ValueError, match=f"exceeds the model's {limit} positions"):
        engine.generate(random_prompts([5]), **arguments, states=True)


def test_rows_end_where_they_should(engine, tokenizer):
    prompts = random_prompts([7] * 40)
    arguments = ARGUMENTS | {"user_keys": range(40), "top_k": 0}
    out = engine.generate(prompts, **arguments)
    assert set(out.finish_reason) == {"answer", "eos", "length"}
    marker = tokenizer.encode(MARKER)
    for r, reason in enumerate(out.finish_reason):
        row, sampled = out.row(r), out.sampled[out.offsets[r] : out.offsets[r + 1]]
        text = tokenizer.decode(row)
        drawn = tokenizer.decode(row[sampled])
        assert MARKER in text
        assert EOS not in row
        if reason == "answer":
            assert sampled.all()
            assert MARKER not in tokenizer.decode(row[:-1])
        else:
            assert MARKER not in drawn
            assert row[~sampled].tolist() == marker
            assert sampled[: len(row) - len(marker)].all()
        assert (sampled.sum() == 12) if reason == "length" else (sampled.sum() <= 12)
    assert (out.log_prob[~out.sampled] == 0).all()
    assert (out.log_prob[out.sampled] < 0).all()
    np.testing.assert_array_equal(out.targets, np.where(out.sampled, out.values, -100))
    assert out.values.dtype == out.offsets.dtype == out.targets.dtype == np.int64
    assert out.log_prob.dtype == np.float32


def test_marker_may_be_spelled_by_several_tokenisations(engine, tokenizer):
    # "b>" alone, "b" + ">", and "b" + ">c" all complete it
    closing = {
        tuple(tokenizer.convert_ids_to_tokens(out_row[-2:].tolist()))
        for out_row in _answer_rows(engine)
    }
    assert {pair[-1] for pair in closing} == {"b>", ">", ">c"}


def _answer_rows(engine):
    arguments = ARGUMENTS | {"user_keys": range(60), "top_k": 0, "temperature": 3.0}
    out = engine.generate(random_prompts([7] * 60), **arguments)
    return [out.row(r) for r, reason in enumerate(out.finish_reason) if reason == "answer"]


@pytest.mark.parametrize("name", KINDS)
def test_samples_do_not_depend_on_the_batch(make_model, tokenizer, prompts, name, decoder):
    engine = TransformersEngine(make_model(name), tokenizer, MARKER, decoder=decoder)
    whole = engine.generate(prompts, **ARGUMENTS)
    one_by_one = engine.generate(prompts, **ARGUMENTS, max_tokens_in_flight=1)
    assert_same(whole, one_by_one)
    order = [2, 0, 3, 1]
    keys = [ARGUMENTS["user_keys"][i] for i in order]
    moved = engine.generate([prompts[i] for i in order], **ARGUMENTS | {"user_keys": keys})
    more = engine.generate(prompts, **ARGUMENTS | {"num_generations": 5})
    for new, old in enumerate(order):
        for g in range(3):
            np.testing.assert_array_equal(moved.row(new * 3 + g), whole.row(old * 3 + g))
            np.testing.assert_array_equal(more.row(old * 5 + g), whole.row(old * 3 + g))


def test_the_token_budget_of_the_engine_splits_the_batch(engine, prompts):
    seen = []
    hook = engine.model.model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[:2])
    )
    rows = {}
    for budget in (65536, 1):
        engine.max_tokens_in_flight = budget
        engine.generate([prompts[0]] * 4, **ARGUMENTS)
        rows[budget] = max(n for n, width in seen if width == 1)
        seen.clear()
    hook.remove()
    # a row that ends at its first token decodes no further
    assert rows[65536] > 3 >= rows[1]


def test_seed_step_and_user_change_the_samples(engine, prompts):
    base = engine.generate(prompts, **ARGUMENTS)
    assert_same(base, engine.generate(prompts, **ARGUMENTS))
    for change in ({"seed": 3}, {"step": 5}, {"user_keys": [6, 2, 9, 4]}):
        other = engine.generate(prompts, **ARGUMENTS | change)
        assert other.values.tolist() != base.values.tolist()


@pytest.mark.parametrize("name", KINDS)
def test_greedy_equals_transformers_greedy(make_model, tokenizer, prompts, name):
    model = make_model(name)
    arguments = ARGUMENTS | {"num_generations": 1, "greedy": True}
    out = TransformersEngine(model, tokenizer, MARKER).generate(prompts, **arguments)
    for r, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
        )[0, len(prompt) :].tolist()
        cuts = [n for n in range(1, 13) if MARKER in tokenizer.decode(expected[:n])]
        expected = expected[: min(cuts, default=12)]
        drawn = out.row(r)[out.sampled[out.offsets[r] : out.offsets[r + 1]]].tolist()
        assert drawn == [token for token in expected if token != EOS]


def test_each_prompt_is_prefilled_once(engine, prompts):
    seen = []
    hook = engine.model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].shape[:2]), with_kwargs=True
    )
    engine.generate(prompts[:1], **ARGUMENTS | {"user_keys": [1], "num_generations": 8})
    hook.remove()
    assert seen[0] == (1, len(prompts[0]))
    assert all(shape[1] == 1 for shape in seen[1:])
    rows = [shape[0] for shape in seen[1:]]
    assert rows == sorted(rows, reverse=True)  # finished rows leave the batch


@pytest.mark.parametrize("wrap", ["plain", "peft"])
def test_training_mode_is_left_as_it_was(make_model, tokenizer, prompts, wrap, decoder):
    model = make_model("gemma2")
    expected = TransformersEngine(model, tokenizer, MARKER, decoder=decoder).generate(
        prompts, **ARGUMENTS
    )
    if wrap == "peft":  # B = 0, so the adapter changes nothing yet; its dropout would
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"]))
    model.gradient_checkpointing_enable()
    model.train()
    frozen = model.get_input_embeddings()
    frozen.training = False
    before = [module.training for module in model.modules()]
    engine = TransformersEngine(model, tokenizer, MARKER, decoder=decoder)
    assert_same(engine.generate(prompts, **ARGUMENTS), expected)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_foreign_attention_implementation_is_switched_and_restored(engine, prompts):
    from transformers import AttentionInterface

    def refuse(*args, **kwargs):
        raise AssertionError("the training attention must not run in a rollout")

    expected = engine.generate(prompts, **ARGUMENTS)
    AttentionInterface.register("rollout_test_refuse", refuse)
    engine.model.set_attn_implementation("rollout_test_refuse")
    assert_same(engine.generate(prompts, **ARGUMENTS), expected)
    assert engine.model.config._attn_implementation == "rollout_test_refuse"

    def explode(*args, **kwargs):
        raise RuntimeError("broken layer")

    engine.model.train()
    hook = engine.model.model.layers[1].register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="broken layer"):
        engine.generate(prompts, **ARGUMENTS)
    hook.remove()
    assert engine.model.config._attn_implementation == "rollout_test_refuse"
    assert engine.model.training


def test_prompts_come_in_any_form_of_rows(engine, prompts):
    expected = engine.generate(prompts, **ARGUMENTS)
    rows = Ragged.of(prompts)
    narrow = Ragged(rows.values.astype(np.int32), rows.offsets)
    for form in (rows, narrow, tuple(map(tuple, prompts)), [torch.tensor(p) for p in prompts]):
        assert_same(engine.generate(form, **ARGUMENTS), expected)
    for row, tokens in enumerate(expected.tokens):
        assert tokens.tolist() == expected.row(row).tolist()


def test_no_prompts_give_no_rows(engine):
    out = engine.generate([], **ARGUMENTS | {"user_keys": []})
    assert len(out) == 0
    assert out.offsets.tolist() == [0]
    assert out.values.shape == out.targets.shape == out.log_prob.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_keys": [1, 2]}, "4 prompts, 2 keys"),
        ({"num_generations": 0}, "num_generations must be >= 1, got 0"),
        ({"max_completion_length": 0}, "max_completion_length must be >= 1, got 0"),
        ({"max_completion_length": 250}, r"13 tokens.*250.*256 positions"),
        ({"temperature": -1.0}, "temperature must be > 0"),
        ({"top_k": -2}, "top_k must be >= 0"),
        ({"max_tokens_in_flight": 0}, "max_tokens_in_flight must be >= 1"),
    ],
)
def test_bad_requests_are_named(engine, prompts, change, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, **ARGUMENTS | change)


def test_empty_prompt_and_empty_marker_are_named(engine, make_model, tokenizer):
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        engine.generate([[1], []], **ARGUMENTS | {"user_keys": [1, 2]})
    with pytest.raises(ValueError, match="marker must be a non-empty string"):
        TransformersEngine(engine.model, tokenizer, "")
    with pytest.raises(ValueError, match="marker_ids must hold at least one token"):
        TransformersEngine(engine.model, tokenizer, MARKER, marker_ids=[])

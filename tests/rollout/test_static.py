"""Static slots: the rows of the other decoders, by steps that never change and never wait."""

import copy
import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from _support.backbones import KINDS
from _support.rollout_cases import EOS, random_prompts
from _support.static_rows import ARGUMENTS, DRAWS, MARKER, assert_equal_rows, rows_of
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config

from r2ec_fast.rollout import TransformersEngine
from r2ec_fast.rollout.job import Job, RowEnds
from r2ec_fast.rollout.noise import row_keys
from r2ec_fast.rollout.sampling import SamplingParams
from r2ec_fast.rollout.static import loop
from r2ec_fast.rollout.static.decoder import StaticDecoder
from r2ec_fast.rollout.static.slots import Slots
from r2ec_fast.rollout.transformers_engine import choose_decoder, newest_states

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2"}


# ---- the same rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("other", ["shared", "plain"])
def test_rows_are_those_of_the_other_decoders(make_model, tokenizer, prompts, name, draws, other):
    model = make_model(name)
    for states in (True, False):
        changes = DRAWS[draws] | {"states": states}
        got = rows_of("static", model, tokenizer, prompts, **changes)
        assert_equal_rows(got, rows_of(other, model, tokenizer, prompts, **changes))


@pytest.mark.parametrize("every", [1, 3, 8, 100])
@pytest.mark.parametrize("length", [1, 2, 8, 11])
def test_rows_do_not_depend_on_when_the_host_looks(
    make_model, tokenizer, monkeypatch, every, length
):
    monkeypatch.setattr(loop, "STOP_EVERY", every)
    model, prompts = make_model("mistral"), random_prompts([7, 3, 9, 7, 5, 7, 4, 1])
    changes = {"user_keys": range(8), "max_completion_length": length}
    right = rows_of("shared", model, tokenizer, prompts, **changes)
    assert_equal_rows(rows_of("static", model, tokenizer, prompts, **changes), right)
    assert length < 8 or set(right.finish_reason) == {"answer", "eos", "length"}


@pytest.mark.parametrize("length", [1, 5])
def test_one_row(make_model, tokenizer, length):
    model = make_model("qwen2")
    for key in range(12):
        changes = {"user_keys": [key], "num_generations": 1, "max_completion_length": length}
        static, shared = (
            rows_of(decoder, model, tokenizer, random_prompts([1 + key], key), **changes)
            for decoder in ("static", "shared")
        )
        assert_equal_rows(static, shared)


@pytest.mark.parametrize("eos", [[], [EOS], [EOS, 3, 7]])
def test_every_token_that_ends_a_text(make_model, tokenizer, prompts, eos):
    model = make_model("llama")
    static, shared = (
        TransformersEngine(model, tokenizer, MARKER, decoder=decoder, eos_token_ids=eos).generate(
            prompts, **ARGUMENTS
        )
        for decoder in ("static", "shared")
    )
    assert_equal_rows(static, shared)
    assert ("eos" in static.finish_reason) == bool(eos)


@pytest.mark.parametrize("marker_ids", [[1], [2, 9, 10, 4]])
def test_an_appended_marker_of_any_length(make_model, tokenizer, prompts, marker_ids):
    model = make_model("gemma3")
    static, shared = (
        TransformersEngine(model, tokenizer, MARKER, marker_ids, decoder=decoder).generate(
            prompts, **ARGUMENTS
        )
        for decoder in ("static", "shared")
    )
    assert_equal_rows(static, shared)
    assert not static.sampled.all()


def test_batches_of_few_prompts(make_model, tokenizer, prompts):
    model = make_model("gemma2")
    whole = rows_of("static", model, tokenizer, prompts)
    assert_equal_rows(rows_of("static", model, tokenizer, prompts, max_tokens_in_flight=1), whole)
    middle = 2 * (13 + 3 * (11 + 1 + 1))
    assert_equal_rows(
        rows_of("static", model, tokenizer, prompts, max_tokens_in_flight=middle), whole
    )


def test_with_an_adapter(make_model, tokenizer, prompts):
    torch.manual_seed(1)
    lora = LoraConfig(
        r=3, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5, lora_alpha=2
    )
    base = make_model("qwen3")
    alone = rows_of("shared", base, tokenizer, prompts)
    model = get_peft_model(base, lora)
    static, shared, plain = (
        rows_of(decoder, model, tokenizer, prompts) for decoder in ("static", "shared", "plain")
    )
    assert_equal_rows(static, shared)
    assert_equal_rows(static, plain)
    assert static.values.tolist() != alone.values.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_error_in_other_types_is_that_of_the_shared_decoder(make_model, tokenizer, dtype):
    """Draws may fall otherwise where rounding decides; each row's numbers are held to the exact
    ones of its own tokens."""
    model, prompts = make_model("mistral", dtype, scale=1.5), random_prompts([9, 4, 13, 20] * 4)
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")

    def error(decoder):
        out = rows_of(decoder, model, tokenizer, prompts, user_keys=range(16))
        errors = []
        for r, prompt in enumerate(p for p in prompts for _ in range(3)):
            row, part = out.row(r), slice(out.offsets[r], out.offsets[r + 1])
            with torch.no_grad():
                logits = exact(input_ids=torch.tensor([[*prompt, *row]])).logits[0]
            log_prob = (logits[len(prompt) - 1 : -1] / 1.3).log_softmax(-1).numpy()
            right = log_prob[np.arange(len(row)), row]
            errors.append((out.log_prob[part] - right)[out.sampled[part]])
        return np.sqrt(np.mean(np.concatenate(errors) ** 2))

    assert error("static") < 1.5 * error("shared") + torch.finfo(dtype).eps


# ---- what a step does ---------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Records every operator with the shapes it takes and gives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        for mask in args[1] if name in ("index", "index_put", "index_put_") else ():
            assert mask is None or mask.dtype != torch.bool, f"{name} by a mask waits"
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        shapes = [tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor)]
        self.seen.append((name, shapes))
        return out


@contextmanager
def slots_of(model, prompts, *, length=9, samples=3, eos=(EOS,), **how):
    """Slots after the prefill and the first draw."""
    rows = len(prompts) * samples
    keys = row_keys(range(len(prompts)), samples, seed=0, step=0, device=model.device)
    ends = RowEnds(None, [1], eos)
    job = Job(None, keys, samples, length, length + 2, SamplingParams(**how), ends)
    decoder = StaticDecoder(model)
    with torch.no_grad(), decoder.session(), newest_states(model) as newest:
        logits = decoder.start(prompts, samples, job.room)
        slots = Slots(decoder, keys, job, newest)
        slots.draw(logits)
        assert slots.tokens.shape == (rows,)
        yield slots


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("draws", DRAWS)
def test_every_step_does_the_same_and_waits_for_nothing(
    make_model, prompts, monkeypatch, name, draws
):
    def waits(*_, **__):
        raise AssertionError("the host reads a number")

    with slots_of(make_model(name), prompts, **DRAWS[draws]) as slots:
        seen, addresses = [], set()
        for step in range(8):
            if step == 5:  # rows of different positions
                slots.place([1] * 12, [p % 4 for p in range(12)])
            with monkeypatch.context() as patched, Operations() as operations:
                for reader in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__"):
                    patched.setattr(torch.Tensor, reader, waits)
                slots.step()
            seen.append(operations.seen)
            held = (slots.tokens, slots.finished, slots.state, slots._drawn, slots._log_prob)
            addresses.add(tuple(tensor.data_ptr() for tensor in held))
    assert all(one == seen[0] for one in seen)
    assert len(addresses) == 1


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("draws", DRAWS)
def test_a_step_runs_where_no_number_can_be_read(make_model, prompts, name, draws):
    """Tensors on "meta" have shapes and no numbers, and refuse others beside them."""
    with slots_of(make_model(name).to("meta"), prompts, **DRAWS[draws]) as slots:
        for _ in range(4):
            slots.step()
        assert slots.tokens.device.type == "meta"


def test_a_row_that_drew_an_end_reads_it_again(make_model, prompts):
    with slots_of(make_model("llama"), prompts, eos=(EOS, 3, 5, 7), temperature=2.0) as slots:
        ended = {}
        for column in range(9):
            if column:
                slots.step()
            drawn, _ = slots.read(column, column + 1)
            for row, (token,) in enumerate(drawn):
                if row not in ended and token in (EOS, 3, 5, 7):
                    ended[row] = token
            assert slots.finished.nonzero().squeeze(1).tolist() == sorted(ended)
            assert all(slots.tokens[row] == token for row, token in ended.items())
        assert len(ended) > 2


def test_nothing_unwritten_is_read(make_model, tokenizer, prompts, monkeypatch):
    """Memory that was only allocated holds NaN; the results must not change."""
    model = make_model("gemma2")
    right = rows_of("static", model, tokenizer, prompts)
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **k: plain(self, *size, **k).fill_(torch.nan)
    )
    got = rows_of("static", model, tokenizer, prompts)
    assert_equal_rows(got, right)
    assert torch.equal(got.states, right.states)


@pytest.mark.parametrize("every", [3, 8])
def test_steps_end_with_the_rows(make_model, tokenizer, prompts, monkeypatch, every):
    monkeypatch.setattr(loop, "STOP_EVERY", every)
    steps = []
    monkeypatch.setattr(loop, "Stepper", lambda step, device: lambda: (steps.append(step), step()))
    model = make_model("llama")
    changes = {"max_completion_length": 60, "temperature": 3.0}
    out = rows_of("static", model, tokenizer, prompts, states=False, **changes)
    longest = max(
        out.sampled[a:b].sum() + (reason == "eos")
        for (a, b), reason in zip(itertools.pairwise(out.offsets), out.finish_reason, strict=True)
    )
    assert len(steps) == min(-(-longest // every) * every, 60) - 1
    steps.clear()
    rows_of("static", model, tokenizer, prompts, states=True, **changes)
    most = 1 + len(tokenizer.encode(MARKER))
    assert 1 <= len(steps) - (min(-(-longest // every) * every, 60) - 1) <= most


# ---- the choice of decoder ----------------------------------------------------------------------


def test_it_is_asked_for_and_refuses_what_it_cannot_run(make_model, monkeypatch):
    model = make_model("llama")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=17, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    gpt2 = AutoModelForCausalLM.from_config(config)
    assert choose_decoder(model) == "shared" and choose_decoder(model, "static") == "static"
    with pytest.raises(ValueError, match="decoder 'static' cannot run this model.*gpt2"):
        choose_decoder(gpt2, "static")
    assert choose_decoder(gpt2) == "plain" and choose_decoder(model, "shared") == "shared"
    with monkeypatch.context() as patched:
        patched.setattr("torch.distributed.fsdp.FSDPModule", nn.Linear)
        with pytest.raises(ValueError, match="'static' cannot run.*sharded over processes"):
            choose_decoder(model, "static")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    stretched = make_model("llama", rope_parameters=rope)
    with pytest.raises(ValueError, match="'static' cannot run.*follow the length of a row"):
        choose_decoder(stretched, "static")
    model.lm_head = nn.Linear(24, 17, bias=False, device="meta")
    with pytest.raises(ValueError, match="'static' cannot run.*on several devices"):
        choose_decoder(model, "static")

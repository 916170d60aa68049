"""A known prefix of all prompts: the states, samples and recommendations of a run without one."""

import numpy as np
import pytest
import torch
from _support.backbones import KINDS
from _support.toy import toy_dataset, toy_model

from r2ec_fast.eval.ranking import transformers_engine
from r2ec_fast.model.attention import VarlenLayout
from r2ec_fast.model.hf_compat import last_layer_at
from r2ec_fast.model.prefix_cache import KnownPrefix
from r2ec_fast.packing.packer import pack_histories
from r2ec_fast.prompts.builder import PromptConfig

DATA = toy_dataset()
CATALOG = DATA.data.catalog


def model_and_rows(kind: str, users: int):
    model = toy_model(kind)
    builder = model.prompt_builder(CATALOG)
    rows = [builder.user_ids(DATA.history(user, 3 + user)) for user in range(users)]
    return model, builder, rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("users", [1, 3])
def test_states_are_those_without_it(kind, users):
    model, builder, rows = model_and_rows(kind, users)
    prefix = model.known_prefix(builder)
    assert prefix.begins(rows) and len(prefix) >= 20
    right = torch.cat([model.encode_rows([row]) for row in rows])
    torch.testing.assert_close(model.encode_rows(rows, prefix=prefix), right, rtol=1e-5, atol=2e-5)
    # a budget that gives every row a batch of its own
    torch.testing.assert_close(
        model.encode_rows(rows, 1, prefix=prefix), right, rtol=1e-5, atol=2e-5
    )


def test_its_keys_and_values_are_used_and_not_computed(monkeypatch):
    model, builder, rows = model_and_rows("llama", 2)
    prefix = model.known_prefix(builder)
    seen = []
    layer = model.language_model.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    right = model.encode_rows(rows, prefix=prefix)
    handle.remove()
    assert seen == [sum(len(row) - len(prefix) for row in rows)]
    keys, values = prefix.states[-1]
    prefix.states[-1] = (keys, values + 1)
    assert (model.encode_rows(rows, prefix=prefix) - right).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder", ["shared", "static", "plain"])
def test_samples_are_those_without_it(kind, decoder):
    model, builder, rows = model_and_rows(kind, 3)
    plain = transformers_engine(model, builder)
    known = transformers_engine(model, builder, prefix=model.known_prefix(builder))
    known.decoder = plain.decoder = decoder
    options = {"user_keys": range(3), "num_generations": 2, "max_completion_length": 6, "top_k": 20}
    right, got = plain.generate(rows, **options), known.generate(rows, **options)
    np.testing.assert_array_equal(got.values, right.values)
    np.testing.assert_allclose(got.log_prob, right.log_prob, rtol=1e-5, atol=2e-5)


def test_rows_that_begin_otherwise_run_without_it():
    model, builder, rows = model_and_rows("llama", 2)
    prefix = model.known_prefix(builder)
    for other in ([[5, 6, 7], *rows], [prefix.tokens, *rows]):
        assert not prefix.begins(other)
        torch.testing.assert_close(
            model.encode_rows(other, prefix=prefix), model.encode_rows(other), rtol=0, atol=0
        )


def test_a_gradient_through_it_is_refused():
    model, builder, rows = model_and_rows("llama", 1)
    with pytest.raises(ValueError, match="prefix: expected None where gradients are wanted"):
        model.read_out(rows, prefix=model.known_prefix(builder))
    with pytest.raises(ValueError, match="tokens: expected at least one, got none"):
        KnownPrefix([])


@pytest.mark.parametrize("window", [1, 20])
def test_every_user_prompt_begins_with_it(window):
    model = toy_model()
    model.prompts = PromptConfig(window=window)
    builder = model.prompt_builder(CATALOG)
    start = builder.user_prefix_ids()
    for user in range(12):
        ids = builder.user_ids(DATA.history(user, 4))
        assert ids[: len(start)] == start and len(ids) > len(start)


def test_a_template_with_nothing_in_common_has_none():
    model = toy_model()
    builder = model.prompt_builder(CATALOG)
    builder.user_prefix_ids = list
    assert model.known_prefix(builder) is None


def test_layout_behind_the_first_tokens():
    (batch,) = pack_histories([[1, 2, 3, 4, 5]], max_tokens=16)
    layout = VarlenLayout.from_batch(batch).behind(3)
    assert layout.cu_seq_lens_q.tolist() == [0, 2] and layout.cu_seq_lens_k.tolist() == [0, 5]
    assert (layout.segments, layout.key_segments, layout.keys) == ([2], [3, 2], [(0, 1)])
    (batch,) = pack_histories([[1, 2, 3]], [[4, 5], [6]], num_generations=2, max_tokens=16)
    layout = VarlenLayout.from_batch(batch).behind(3)
    assert layout.cu_seq_lens_q.tolist() == [0, 2, 3] and layout.cu_seq_lens_k.tolist() == [0, 5, 9]
    assert layout.kv_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert (layout.segments, layout.key_segments) == ([2, 1], [3, 2, 1])
    assert layout.keys == [(0, 1), (0, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_last_layer_computes_only_the_rows_that_are_read(kind):
    model, _, rows = model_and_rows(kind, 3)
    (batch,) = pack_histories(rows, max_tokens=1000)
    decoder, sizes = model.language_model.get_decoder(), []
    right = model(batch)[batch.readout]
    handle = decoder.layers[-1].mlp.register_forward_pre_hook(
        lambda module, args: sizes.append(args[0].shape[1])
    )
    with last_layer_at(decoder, batch.readout), torch.no_grad():
        got = model(batch)[batch.readout]
    handle.remove()
    torch.testing.assert_close(got, right, rtol=1e-5, atol=2e-5)
    assert sizes == [batch.input_ids.shape[1]]  # the hook before sees all, the MLP three
    assert not decoder.layers[-1].mlp._forward_pre_hooks  # and nothing is left behind
    with last_layer_at(torch.nn.Linear(2, 2), batch.readout):
        pass  # a decoder with other names runs whole

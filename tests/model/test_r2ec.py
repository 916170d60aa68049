"""The dual-head model: read-outs, heads, files."""

import pytest
import torch
from _support.backbones import KINDS
from _support.toy import toy_dataset, toy_model

from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.packing import Ragged
from r2ec_fast.packing.packer import pack_histories, pack_readouts

# transformers computes norms, and eager attention its softmax, in float32 whatever the model's type
FLOAT32_INSIDE = {"rtol": 1e-5, "atol": 2e-5}


def plain_states(model: R2ecModel, row: list[int]) -> torch.Tensor:
    """All states of one row, by the backbone's own forward pass."""
    out = model.language_model(
        input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=False
    )
    return out.hidden_states[-1][0]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_states_are_those_of_each_row_alone(kind):
    model = toy_model(kind)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, 400, (n,), generator=generator).tolist() for n in (3, 17, 9, 1)]
    (batch,) = pack_histories(rows, max_tokens=64)
    states = model(batch)
    bounds = batch.cu_seq_lens_q.tolist()
    for place, row in enumerate(batch.groups.tolist()):
        expected = plain_states(model, rows[row])
        torch.testing.assert_close(
            states[bounds[place] : bounds[place + 1]], expected, **FLOAT32_INSIDE
        )


@pytest.mark.parametrize("kind", KINDS)
def test_read_out_is_the_state_of_the_last_token(kind):
    # the reference code reads the longest row one token early (trap 4 of docs/method.md)
    model = toy_model(kind)
    start = [7, 8, 9]
    rows = [[*start, 10, 11, 12, 13], [*start, 20], [*start, 30, 31, 32, 33, 34, 35, 36]]
    states = model.read_out(rows, max_tokens=16)
    for state, row in zip(states, rows, strict=True):
        alone = plain_states(model, row)
        torch.testing.assert_close(state, alone[-1], **FLOAT32_INSIDE)
        assert (state - alone[-2]).abs().max() > 0.1


def test_read_out_gradient_is_that_of_each_row_alone():
    model = toy_model()
    rows = [[7, 8, 10], [7, 8, 11, 12], [7, 9]]
    weights = torch.randn(3, 32, dtype=torch.float64)
    parameters = list(model.parameters())
    packed = torch.autograd.grad((model.read_out(rows) * weights).sum(), parameters)
    alone = torch.stack([plain_states(model, row)[-1] for row in rows])
    for ours, theirs in zip(
        packed, torch.autograd.grad((alone * weights).sum(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **FLOAT32_INSIDE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_recomputed_activations_give_the_same_gradient(kind, lora):
    rows = [[7, 8, 10, 13, 14, 15, 16], [7, 8, 11, 12], [7, 9]]

    def gradients(recompute: bool) -> dict[str, torch.Tensor]:
        model = toy_model(kind)
        if lora:
            model.add_lora(r=2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
            elif "lora_A" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(4))
        if recompute:
            model.checkpoint_activations()
        calls = []
        layer = model.language_model.get_decoder().layers[0].mlp
        layer.register_forward_pre_hook(lambda module, inputs: calls.append(1))
        model.train().read_out(rows).square().sum().backward()
        assert len(calls) == (2 if recompute else 1)  # in the backward pass once more
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    kept, recomputed = gradients(False), gradients(True)
    assert kept.keys() == recomputed.keys() and kept
    for name, right in kept.items():
        torch.testing.assert_close(recomputed[name], right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("rows", "length"),
    [([[1, 2, 3], [1, 2]], 1), ([[1, 2], [3, 4]], 0), ([[5], [5]], 0), ([[1, 2, 3]] * 2, 2)],
)
def test_the_prefix_laid_out_once_leaves_every_row_a_token(rows, length):
    batches = list(pack_readouts(Ragged.of(rows), max_tokens=100))
    assert [source.tolist() for _, source in batches] == [[0, 1]]
    tokens = sum(map(len, rows)) - length
    assert [batch.num_tokens for batch, _ in batches] == [tokens]


def test_head_is_the_models_own():
    model = toy_model("gemma2")
    ids = torch.tensor([[5, 6, 7]])
    hidden = plain_states(model, ids[0].tolist())
    logits = hidden @ model.lm_head_weight.T
    logits = model.softcap * torch.tanh(logits / model.softcap)
    torch.testing.assert_close(logits, model.language_model(input_ids=ids).logits[0])


def test_unknown_head_is_refused():
    model = toy_model()
    head = model.language_model.lm_head
    model.language_model.lm_head = torch.nn.Sequential(head, torch.nn.Softplus())
    model.language_model.get_output_embeddings = lambda: head
    with pytest.raises(ValueError, match="backbone.*logits"):
        R2ecModel(model.language_model, model.tokenizer)


@pytest.mark.parametrize("lora", [False, True])
def test_save_and_load(tmp_path, lora):
    model, data = toy_model(dtype=torch.float32), toy_dataset()
    model.language_model.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    model = R2ecModel.from_pretrained(tmp_path / "base")
    if lora:
        model.add_lora()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
    model.set_items(model.encode_items(data.data.catalog))
    model.save_pretrained(tmp_path / "saved", data.data.catalog)
    again = R2ecModel.from_pretrained(tmp_path / "saved")
    assert (again.similarity, again.temperature) == (model.similarity, model.temperature)
    assert again.prompts == model.prompts
    torch.testing.assert_close(again.read_out([[5, 6], [7]]), model.read_out([[5, 6], [7]]))
    torch.testing.assert_close(again.index.items, model.index.items)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_items_are_encoded_in_id_order():
    model, data = toy_model(), toy_dataset()
    table = model.encode_items(data.data.catalog, max_tokens=40)
    builder = model.prompt_builder(data.data.catalog)
    for item in (0, 7, 15):
        torch.testing.assert_close(table[item], plain_states(model, builder.item_ids(item))[-1])

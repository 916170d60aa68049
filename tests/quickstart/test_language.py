"""The tokenizer made for a world, its prompts, and the small model."""

from __future__ import annotations

import pytest
import torch

from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.quickstart.language import new_model, train_tokenizer
from r2ec_fast.quickstart.reasoning import write_chain
from r2ec_fast.quickstart.world import COLOURS, PRODUCTS, World

WORLD = World(products=9, colours=3, users=20)


@pytest.fixture(scope="module")
def dataset():
    return WORLD.dataset()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return new_model(WORLD, layers=1, hidden_size=32)


def pieces(tokenizer, ids) -> list[str]:
    return [tokenizer.decode([i]) for i in ids]


def test_a_step_has_four_tokens(dataset):
    world = World(products=len(PRODUCTS), colours=len(COLOURS), users=5)
    tokenizer = train_tokenizer(world)
    history = world.dataset().history(0, 4).items
    for steps in range(4):
        text = write_chain(world.chain(history, steps=steps))
        ids = tokenizer(f"{text}<answer>").input_ids
        assert len(ids) == 4 * steps + 4
        assert tokenizer.decode(ids) == f"{text}<answer>"
        assert pieces(tokenizer, ids)[-2:] == [" comes next.", "<answer>"]


def test_an_event_has_five_tokens(dataset, model):
    builder = model.prompt_builder(dataset.data.catalog)
    counts = {len(builder.user_ids(dataset.history(3, p, p))) for p in (1, 2, 3)}
    assert len({count - 5 * i for i, count in enumerate(sorted(counts))}) == 1


@pytest.mark.parametrize("text", ["", "Zażółć\ngęślą 12d", "lanterns! So a\t<ans", "\0  é"])
def test_any_text_can_be_encoded(model, text):
    tokenizer = model.tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_prompts_are_assembled_from_segments(dataset, model):
    builder = model.prompt_builder(dataset.data.catalog)
    assembler = PromptAssembler(builder)
    assert assembler.reason is None
    rows = assembler.example_rows(dataset, dataset.train)
    for row, user, position in zip(rows, dataset.train.user, dataset.train.position, strict=True):
        assert row.tolist() == builder.user_ids(dataset.history(int(user), int(position), 3))
    assert len(builder.marker_ids) == 1


def test_the_seed_of_torch_decides_the_weights(model):
    torch.manual_seed(0)
    again = new_model(WORLD, layers=1, hidden_size=32)
    states = zip(model.backbone.parameters(), again.backbone.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in states)
    assert model.prompts.window == WORLD.steps


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layers": 0}, "layers: expected at least 1, got 0"),
        ({"hidden_size": 40}, "hidden_size: expected a multiple of 16, got 40"),
    ],
)
def test_models_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        new_model(WORLD, **wrong)

"""What the warm-up of a generated world shows a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from r2ec_fast.eval.ranking import transformers_engine
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.quickstart.language import new_model
from r2ec_fast.quickstart.reasoning import judge_reasoning, read_chain
from r2ec_fast.quickstart.warmup import WarmUp, chain_reasonings, warm_up
from r2ec_fast.quickstart.world import ORDERS, World

WORLD = World(products=12, colours=3, steps=2, users=200, events=6, seed=4)
DATA = WORLD.dataset()


def test_records_are_true_chains_of_both_orders_and_every_length():
    records = chain_reasonings(WORLD, DATA, 600)
    histories = Ragged.of(DATA.exclude(records.examples, WORLD.steps))
    seen = set()
    for text, item, history in zip(records.texts, records.items, histories, strict=True):
        chain = read_chain(text)
        walks = {
            order: WORLD.chain(history, steps=len(chain.links), order=order) for order in ORDERS
        }
        assert chain in walks.values() and item // WORLD.colours == chain.end
        seen |= {(len(chain.links), order) for order, walk in walks.items() if walk == chain}
    assert seen == {(steps, order) for steps in range(3) for order in ORDERS}
    # in any colour, whatever was bought: one in three has the target's own by chance
    colours = np.bincount(records.items % 3, minlength=3)
    assert colours.min() > 150 and (records.items != DATA.target(records.examples)).mean() > 0.8


def test_lengths_say_how_often_a_chain_has_so_many_steps():
    for lengths in ((1.0,), (0.25, 0.75), (0.0, 0.0, 1.0)):
        records = chain_reasonings(WORLD, DATA, 400, lengths=lengths)
        steps = [len(read_chain(text).links) for text in records.texts]
        assert np.bincount(steps, minlength=len(lengths)) / 400 == pytest.approx(lengths, abs=0.08)


@pytest.mark.parametrize("lengths", [(), (0.5, 0.4), (1.5, -0.5), (0.25, 0.25, 0.25, 0.25)])
def test_other_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths: expected 1 to 3 shares that sum to 1"):
        chain_reasonings(WORLD, DATA, 10, lengths=lengths)


@pytest.mark.slow
def test_a_warmed_up_model_writes_true_chains_also_after_it_was_saved(tmp_path):
    torch.manual_seed(0)
    model = new_model(WORLD, layers=2, hidden_size=96)
    warm_up(model, WORLD, DATA, WarmUp(language_steps=300, item_steps=50, batch=16))
    model.save_pretrained(tmp_path / "model")
    model = type(model).from_pretrained(tmp_path / "model")
    builder = model.prompt_builder(DATA.data.catalog)
    some = DATA.test[:60]
    written = transformers_engine(model, builder).generate(
        PromptAssembler(builder).example_rows(DATA, some),
        user_keys=range(len(some)),
        num_generations=1,
        max_completion_length=20,
    )
    found = []
    for row, history in zip(written.tokens, Ragged.of(DATA.exclude(some)), strict=True):
        text = model.tokenizer.decode(row).removesuffix("<answer>")
        found.append(judge_reasoning(WORLD, text, history))
    assert np.mean([f.well_formed for f in found]) > 0.9
    assert np.mean([step for f in found for step in f.true_steps]) > 0.8

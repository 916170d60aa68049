"""Chains in words, and what is read from a written reasoning."""

from __future__ import annotations

import numpy as np
import pytest

from r2ec_fast.quickstart.reasoning import judge_reasoning, read_chain, write_chain
from r2ec_fast.quickstart.world import COLOURS, ORDERS, PRODUCTS, Chain, Link, World

WORLD = World(products=20, colours=4, seed=9)
HISTORY = np.array([3 * 4 + 1, 17 * 4 + 3, 6 * 4 + 0])  # ivory, navy, amber


def sentence(colour: str, product: int) -> str:
    after = int(WORLD.leads_to[COLOURS.index(colour), product])
    article = "An" if colour in ("amber", "ivory") else "A"
    return f"{article} {colour} {PRODUCTS[product]} leads to a {PRODUCTS[after]}. "


def test_a_chain_reads_as_sentences():
    chain = Chain((Link(0, 1, 3), Link(2, 3, 37)), 37)
    text = "An amber lantern leads to a kettle. A jade kettle leads to a tripod. "
    assert write_chain(chain) == text + "So a tripod comes next."
    assert write_chain(Chain((), 0)) == "So a tent comes next."


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", range(4))
def test_reading_gives_back_what_was_written(order, steps):
    chain = WORLD.chain(HISTORY, steps=steps, order=order)
    assert read_chain(write_chain(chain)) == chain
    assert read_chain(f" {write_chain(chain)}\n") == chain


@pytest.mark.parametrize(
    "text",
    [
        "",
        "So a tripod comes next. So a tripod comes next.",
        "An amber lantern leads to a kettle.",
        "An amber lantern leads to a kettle. So a kettle",
        "So a kettle comes next. An amber lantern leads to a kettle.",
        "A amber lantern leads to a kettle. So a kettle comes next.",
        "An amber lantern leads to a lanterns. So a kettle comes next.",
    ],
)
def test_other_text_is_no_chain(text):
    assert read_chain(text) is None
    found = judge_reasoning(WORLD, text, HISTORY)
    assert not found.well_formed and not found.right


def test_the_right_chain_is_right():
    found = judge_reasoning(WORLD, write_chain(WORLD.chain(HISTORY)), HISTORY)
    assert found.steps == 3 and found.true_steps == (True, True, True)
    assert found.well_formed and found.right


def test_a_shorter_chain_and_the_other_order_are_true_but_not_right():
    for wrong in ({"steps": 2}, {"steps": 0}, {"order": "oldest_first"}):
        chain = WORLD.chain(HISTORY, **wrong)
        found = judge_reasoning(WORLD, write_chain(chain), HISTORY)
        assert found.steps == len(chain.links) and all(found.true_steps)
        assert found.well_formed and not found.right


def test_a_false_step_is_found():
    wrong = (int(WORLD.leads_to[3, 6]) + 1) % 20
    text = sentence("amber", 6) + f"A navy {PRODUCTS[6]} leads to a {PRODUCTS[wrong]}. "
    found = judge_reasoning(WORLD, f"{text}So a tent comes next.", HISTORY)
    assert found.true_steps == (True, False) and found.well_formed and not found.right


def test_the_right_steps_with_another_end_are_not_right():
    text = write_chain(WORLD.chain(HISTORY))
    end = PRODUCTS[WORLD.chain(HISTORY).end]
    other = PRODUCTS[0] if end != PRODUCTS[0] else PRODUCTS[1]
    found = judge_reasoning(WORLD, text.replace(f"So a {end}", f"So a {other}"), HISTORY)
    assert found.true_steps == (True, True, True) and found.well_formed and not found.right


def test_words_of_larger_worlds_are_no_true_steps():
    text = "An olive tent leads to a lantern. An amber stapler leads to a tent. So a tent"
    assert judge_reasoning(WORLD, text, HISTORY).true_steps == (False, False)


def test_steps_are_counted_in_broken_text():
    text = "leads to a " + sentence("jade", 2) + "So a " + sentence("navy", 4)
    found = judge_reasoning(WORLD, text, HISTORY)
    assert found.steps == 2 and found.true_steps == (True, True) and not found.well_formed

"""The warm-up: records of the world, and a training that knows only records."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax

from r2ec_fast.quickstart.language import new_model
from r2ec_fast.quickstart.reasoning import judge_reasoning, read_chain, write_chain
from r2ec_fast.quickstart.warmup import Record, learn, write_records
from r2ec_fast.quickstart.world import World

WORLD = World(products=9, colours=3, users=40)


@pytest.fixture(scope="module")
def dataset():
    return WORLD.dataset()


@pytest.fixture
def model():
    torch.manual_seed(3)
    return new_model(WORLD, layers=1, hidden_size=32)


# ---- records ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(dataset):
    return write_records(WORLD, dataset, 400, items_from=100, seed=1)


def test_records_are_true_chains_of_their_histories_in_both_orders(dataset, records):
    counts = {}
    for record in records:
        history = dataset.history(record.user, record.position, 3).items
        assert all(judge_reasoning(WORLD, record.text, history).true_steps)
        ways = {
            (steps, order)
            for steps in range(4)
            for order in ("newest_first", "oldest_first")
            if write_chain(WORLD.chain(history, steps=steps, order=order)) == record.text
        }
        assert ways
        if len(ways) == 1:
            counts.update({way: counts.get(way, 0) + 1 for way in ways})
    # zero steps are the same in both orders; the others are about an eighth of the records each
    assert len(counts) == 6 and min(counts.values()) > 15


def test_the_item_of_a_record_is_at_the_end_of_its_chain(records):
    assert all(record.item is None for record in records[:100])
    assert {record.item % 3 for record in records[100:]} == {0, 1, 2}
    for record in records[100:]:
        assert record.item // 3 == read_chain(record.text).end


def test_records_are_of_training_examples(dataset, records):
    train = set(zip(dataset.train.user.tolist(), dataset.train.position.tolist(), strict=True))
    assert {(record.user, record.position) for record in records} <= train


def test_the_seed_decides_the_records(dataset, records):
    assert write_records(WORLD, dataset, 400, items_from=100, seed=1) == records
    assert write_records(WORLD, dataset, 400, items_from=100, seed=2) != records


# ---- learning -----------------------------------------------------------------------------------


def by_hand(model, dataset, records) -> tuple[float, float]:
    """Token and item loss row by row, with transformers' own attention and no packing."""
    builder = model.prompt_builder(dataset.data.catalog)
    model.eval()

    def states(ids):
        out = model.language_model.model(input_ids=torch.tensor([ids]))
        return out.last_hidden_state[0]

    token_terms, reads, items = [], [], []
    with torch.no_grad():
        for record in records:
            prompt = builder.user_ids(dataset.history(record.user, record.position, 3))
            text = model.tokenizer(f"{record.text}<answer>").input_ids
            hidden = states([*prompt, *text])
            logits = hidden @ model.lm_head_weight.T
            for i, token in enumerate(text):
                token_terms.append(-log_softmax(logits[len(prompt) + i - 1], 0)[token])
            if record.item is not None:
                reads.append(hidden[-1])
                items.append(record.item)
        distinct = sorted(set(items))
        table = torch.stack([states(builder.item_ids(item))[-1] for item in distinct])
        scores = cosine_similarity(torch.stack(reads)[:, None], table[None], dim=2)
        targets = torch.tensor([distinct.index(item) for item in items])
        item_loss = cross_entropy(scores / model.temperature, targets)
    return float(torch.stack(token_terms).mean()), float(item_loss)


def test_the_loss_is_that_of_each_row_alone(dataset, model):
    records = write_records(WORLD, dataset, 6, items_from=0, seed=4)
    records[1] = records[1]._replace(item=None)
    records[2] = records[2]._replace(item=records[3].item)
    token, item = by_hand(model, dataset, records)
    (loss,) = learn(model, dataset, records, batch_size=6, learning_rate=1e-3)
    assert loss.token == pytest.approx(token, rel=1e-4)
    assert loss.item == pytest.approx(item, rel=1e-4)


def test_every_weight_learns_and_the_loss_falls(dataset, model):
    before = {name: value.clone() for name, value in model.named_parameters()}
    records = write_records(WORLD, dataset, 8, items_from=0, seed=5) * 60
    seen = []
    losses = learn(
        model,
        dataset,
        records,
        batch_size=8,
        learning_rate=5e-3,
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    assert seen == list(enumerate(losses, start=1)) and len(losses) == 60
    assert losses[-1].token < 0.25 * losses[0].token and losses[-1].item < 0.5 * losses[0].item
    assert not any(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_language_alone(dataset, model):
    records = write_records(WORLD, dataset, 7, items_from=7, seed=6)
    losses = learn(model, dataset, records, batch_size=3, learning_rate=1e-3)
    assert len(losses) == 2 and all(math.isnan(loss.item) for loss in losses)
    assert np.isfinite([loss.token for loss in losses]).all()


def test_too_few_records(dataset, model):
    record = Record(0, 3, "So a tent comes next.")
    with pytest.raises(ValueError, match="records: expected at least 4, a step's, got 1"):
        learn(model, dataset, [record], batch_size=4, learning_rate=1e-3)

"""One recommender asked by several threads; states that are no numbers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from _support.toy import toy_dataset, toy_model

from r2ec_fast.eval.ranking import rank_examples
from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.serve.recommender import Recommender

THREADS = 4


@pytest.fixture(scope="module")
def recommender():
    data = toy_dataset()
    model = toy_model(dtype=torch.float32).eval()
    return Recommender(model, data.data.catalog, data=data)


def answers(recommender, user: int, reasoning: bool):
    [found] = recommender.recommend(
        [f"u{user % 12}"], 5, reasoning, max_completion_length=6 + user % 3
    )
    return [(r.item_id, r.score) for r in found], found.reasoning


@pytest.mark.parametrize("mode", ["direct", "reasoned", "mixed"])
def test_every_thread_gets_its_own_users_answer(recommender, mode):
    def work(job):
        if job < THREADS:
            start.wait(timeout=30)
        return answers(recommender, job, mode == "reasoned" or (mode == "mixed" and job % 2))

    start = threading.Barrier(1)
    jobs = range(36)
    alone = [work(job) for job in jobs]
    start = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(work, jobs, timeout=200))
    for want, found in zip(alone, together, strict=True):
        assert want[1] == found[1]
        assert [item for item, _ in want[0]] == [item for item, _ in found[0]]


def test_titles_are_looked_up_by_several_threads(recommender):
    recommender._titles = None
    titles = recommender.catalog.titles

    def work(job):
        return recommender._item(titles[job % 16])

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(400))) == [job % 16 for job in range(400)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reasoning", [False, True])
def test_a_model_that_is_no_numbers_recommends_nothing(value, reasoning):
    data = toy_dataset()
    model = toy_model(dtype=torch.float32).eval()
    recommender = Recommender(model, data.data.catalog, data=data)
    recommender.prefix = None
    with torch.no_grad():
        model.language_model.model.norm.weight[3] = value
    with pytest.raises(ValueError, match="model: the states of 2 of 2 histories hold NaN or inf"):
        recommender.recommend(["u0", "u1"], 3, reasoning, max_completion_length=4)


def test_an_evaluation_counts_states_that_are_no_numbers(caplog):
    data = toy_dataset()
    model = toy_model(dtype=torch.float32).eval()
    model.set_items(model.encode_items(data.data.catalog))
    assembler = PromptAssembler(model.prompt_builder(data.data.catalog))
    with torch.no_grad():
        model.language_model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="model: 12 of 12 user states hold NaN or infinity"):
        rank_examples(model, assembler, data, data.test)
    ranks, _ = rank_examples(model, assembler, data, data.test, allow_non_finite=True)
    assert (ranks > 5).all() and "their targets rank last" in caplog.text


@pytest.mark.parametrize(
    "histories",
    [
        np.array(["u0", "u3"]),
        [np.array(["i1", "i4"])],
        [np.str_("u0")],
        [("i1", np.str_("i2"))],
    ],
    ids=["users", "items", "a user", "an item"],
)
def test_numpy_values_are_taken(recommender, histories):
    assert len(recommender.recommend(histories, np.int64(3), False)) == len(histories)


@pytest.mark.parametrize("entry", [{"i1", "i2"}, {"i1": 1}, bytearray(b"u0")])
def test_entries_of_other_kinds_are_named(recommender, entry):
    with pytest.raises(TypeError, match=f"histories: .* got {type(entry).__name__}"):
        recommender.recommend([entry], 3, False)

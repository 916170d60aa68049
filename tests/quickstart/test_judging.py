"""Sampled reasonings are judged on their way, and the picture shows it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from r2ec_fast.quickstart.judging import JudgedEngine, read_judgements
from r2ec_fast.quickstart.language import train_tokenizer
from r2ec_fast.quickstart.picture import draw
from r2ec_fast.quickstart.reasoning import write_chain
from r2ec_fast.quickstart.world import World
from r2ec_fast.rollout.base import Trajectory, assemble

WORLD = World(products=9, colours=3, users=20)
KEYS = [4, 7]


@pytest.fixture(scope="module")
def dataset():
    return WORLD.dataset()


class Inner:
    """Writes two reasonings a user: the right chain, and one of a single step."""

    def __init__(self, dataset, tokenizer) -> None:
        self.dataset, self.tokenizer, self.calls = dataset, tokenizer, []

    def generate(self, prompts, **settings):
        self.calls.append((prompts, settings))
        rows = []
        for key in KEYS:
            user, position = self.dataset.train.user[key], self.dataset.train.position[key]
            history = self.dataset.history(int(user), int(position)).items
            for steps in (3, 1):
                ids = self.tokenizer(write_chain(WORLD.chain(history, steps=steps))).input_ids
                rows.append(Trajectory(ids, [0.0] * len(ids), "eos"))
        self.rollouts = assemble(rows, self.tokenizer("<answer>").input_ids)
        return self.rollouts


def test_samples_are_judged_and_passed_on(dataset, tmp_path):
    tokenizer = train_tokenizer(WORLD)
    inner = Inner(dataset, tokenizer)
    model = SimpleNamespace(tokenizer=tokenizer, prompts=SimpleNamespace(emb_token="<answer>"))
    trainer = SimpleNamespace(engine=inner, model=model, data=dataset)
    engine = JudgedEngine(trainer, WORLD, tmp_path / "judgements.jsonl")
    settings = {
        "user_keys": KEYS,
        "num_generations": 2,
        "max_completion_length": 20,
        "temperature": 1.5,
        "top_k": 9,
        "seed": 3,
        "step": 5,
        "greedy": False,
        "states": True,
    }
    assert engine.generate([[1], [2]], **settings) is inner.rollouts
    assert inner.calls == [([[1], [2]], settings)]
    expected = {"step": 5, "right": 0.5, "well_formed": 1.0, "steps": 2.0}
    assert read_judgements(tmp_path) == [expected]
    engine.generate([[1], [2]], **settings | {"greedy": True})
    assert len(inner.calls) == 2 and read_judgements(tmp_path) == [expected]
    engine.generate([[1], [2]], **settings | {"step": 4})  # a step done again counts once
    engine.generate([[1], [2]], **settings)
    assert [record["step"] for record in read_judgements(tmp_path)] == [4, 5]


def test_the_picture(tmp_path):
    steps = np.arange(1, 9)
    metrics = [{"step": int(s), "reward": 0.1 * int(s)} for s in steps]
    judged = [{"step": int(s), "right": 0.05 * int(s), "steps": 2.0} for s in steps]
    for name, records in (("metrics.jsonl", metrics), ("judgements.jsonl", judged)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    draw(tmp_path, tmp_path / "picture.png", steps=3)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

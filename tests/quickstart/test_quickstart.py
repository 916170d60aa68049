"""The quick start at a toy size: everything it writes and says, and the same numbers twice."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest

from r2ec_fast.quickstart import stages
from r2ec_fast.quickstart.pipeline import ends, run
from r2ec_fast.quickstart.previous_world import Sizes, reasoning_text
from r2ec_fast.train.trainer import RecPOTrainer
from r2ec_fast.utils.signals import RunStopped

TOY = Sizes(
    users=40,
    hidden_size=32,
    layers=1,
    warmup_steps=3,
    contrastive_steps=2,
    recpo_steps=4,
    batch=6,
    recpo_batch=3,
    generations=2,
    test_examples=8,
)
METHODS = [
    "popularity",
    "markov-1",
    "item-knn",
    "contrastive (direct)",
    "RecPO (direct)",
    "RecPO (reasoned)",
]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    output = tmp_path_factory.mktemp("first")
    return output, run(output, seed=1, sizes=TOY)


def test_it_writes_data_models_results_and_picture(first):
    output, rows = first
    assert list(rows) == METHODS
    assert json.loads((output / "results.json").read_text()) == rows
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    for part in ("data/manifest.json", "contrastive/model", "recpo/model", "recpo/metrics.jsonl"):
        assert (output / part).exists(), part
    log = [json.loads(line) for line in (output / "recpo/metrics.jsonl").read_text().splitlines()]
    assert sum("reward" in record for record in log) == 4
    assert all(rows[name]["examples"] == 8 for name in METHODS)


def test_the_same_seed_gives_the_same_numbers_and_says_that_data_is_generated(
    first, tmp_path, capsys
):
    capsys.readouterr()
    again = run(tmp_path, seed=1, sizes=TOY)
    assert again == first[1]
    out = capsys.readouterr().out
    assert out.startswith("Everything below is GENERATED data")
    assert out.count("reasoning: ") == out.count("history: ") == 3
    assert all(f"| {name} |" in out for name in METHODS)
    weights = "recpo/model/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (first[0] / weights).read_bytes()


def test_another_seed_gives_other_numbers(first, tmp_path):
    other = run(tmp_path, seed=2, sizes=TOY)
    one, two = (rows["RecPO (reasoned)"]["mrr@20"] for rows in (first[1], other))
    weights = "recpo/model/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() != (first[0] / weights).read_bytes()
    assert np.isfinite([one, two]).all()


def test_a_reasoning_names_the_three_items_attributes():
    rows = [
        {"brand": f"B{i}", "color": f"C{i}", "kit": f"K{i}", "product": f"P{i}"} for i in range(3)
    ]
    assert reasoning_text(*rows) == "Something by B0 in c1 that goes with the k2 p2."


def test_ends_are_the_first_and_last_quarter():
    assert ends([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0]) == (1.5, 8.0)


@pytest.mark.slow
def test_recpo_and_contrastive_learn(tmp_path):
    rows = run(tmp_path)
    bar = 3 * rows["popularity"]["ndcg@10"]
    for name in METHODS[3:]:
        assert rows[name]["ndcg@10"] >= max(bar, 0.02), name
    log = [json.loads(line) for line in (tmp_path / "recpo/metrics.jsonl").read_text().splitlines()]
    before, after = ends([record["reward"] for record in log if "reward" in record])
    assert after > before


@pytest.mark.parametrize("stage", ["contrastive", "recpo"])
def test_sigterm_stops_it_and_the_same_call_goes_on(first, tmp_path, capfd, monkeypatch, stage):
    step = RecPOTrainer._train_step

    def told_to_end(self, number):
        if self.config.objective == stage and number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(RecPOTrainer, "_train_step", told_to_end)
        with pytest.raises(RunStopped, match="stopped by SIGTERM after step 2 of .*goes on"):
            run(tmp_path, seed=1, sizes=TOY)
    out = capfd.readouterr().out
    assert "| RecPO (reasoned) |" not in out and not (tmp_path / "results.json").exists()
    assert run(tmp_path, seed=1, sizes=TOY) == first[1]
    again = capfd.readouterr()
    assert "warm-up:" not in again.out and "FutureWarning" not in again.err
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="output_dir: .* holds a finished quick start"):
        run(tmp_path, seed=1, sizes=TOY)
    with pytest.raises(ValueError, match=r"output_dir: .* of other settings \(seed 1\)"):
        run(tmp_path, seed=2, sizes=TOY)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["results.json", "recpo/notes.txt", "data/photo.png"])
def test_a_users_files_are_not_replaced(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("a user's")
    with pytest.raises(ValueError, match=f"output_dir: .* holds {name.partition('/')[0]}, which"):
        run(tmp_path, seed=1, sizes=TOY)
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["a user's"]


@pytest.mark.parametrize("function", ["warm_up", "evaluate", "baselines"])
def test_sigterm_between_trainings_stops_it_too(first, tmp_path, capfd, monkeypatch, function):
    def told_to_end(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(stages, function, told_to_end)
        with pytest.raises(RunStopped, match="stopped by SIGTERM; the same command goes on"):
            run(tmp_path, seed=1, sizes=TOY)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "results.json").exists()
    assert run(tmp_path, seed=1, sizes=TOY) == first[1]

"""The quick start at a toy size: everything it writes and says, and the same numbers twice."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest

from r2ec_fast.quickstart import stages
from r2ec_fast.quickstart.judging import read_judgements
from r2ec_fast.quickstart.pipeline import ends, run
from r2ec_fast.quickstart.progress import StepLines
from r2ec_fast.quickstart.stages import Sizes
from r2ec_fast.quickstart.world import World
from r2ec_fast.train.trainer import RecPOTrainer
from r2ec_fast.utils.signals import RunStopped

TOY = Sizes(
    world=World(products=8, colours=3, users=40, events=6),
    hidden_size=32,
    layers=1,
    warmup_steps=3,
    warmup_item_steps=1,
    warmup_batch=6,
    direct_steps=2,
    direct_batch=6,
    recpo_steps=4,
    recpo_batch=3,
    generations=2,
    test_examples=8,
)
METHODS = [
    "popularity",
    "markov-1",
    "item-knn",
    "direct, trained",
    "reasoned, before RecPO",
    "reasoned, after RecPO",
    "best possible",
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
    for part in (
        "data/manifest.json",
        "warmup",
        "direct/model",
        "recpo/model",
        "recpo/metrics.jsonl",
    ):
        assert (output / part).exists(), part
    log = [json.loads(line) for line in (output / "recpo/metrics.jsonl").read_text().splitlines()]
    assert sum("reward" in record for record in log) == 4
    assert all(rows[name]["examples"] == 8 for name in METHODS)
    assert [record["step"] for record in read_judgements(output / "recpo")] == [1, 2, 3, 4]


def test_the_same_seed_gives_the_same_numbers_and_says_that_data_is_generated(
    first, tmp_path, capsys
):
    capsys.readouterr()
    again = run(tmp_path, seed=1, sizes=TOY)
    assert again == first[1]
    out = capsys.readouterr().out
    assert out.startswith("Everything below is GENERATED data")
    assert all(f"| {name} |" in out for name in METHODS)
    assert out.count("before RecPO: ") == out.count("after RecPO: ") == 1
    assert out.count(" recommends ") == 2 and " comes next." in out and "\r" not in out
    weights = "recpo/model/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (first[0] / weights).read_bytes()


def test_another_seed_gives_other_numbers(first, tmp_path):
    other = run(tmp_path, seed=2, sizes=TOY)
    one, two = (rows["reasoned, after RecPO"]["mrr@20"] for rows in (first[1], other))
    weights = "recpo/model/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() != (first[0] / weights).read_bytes()
    assert np.isfinite([one, two]).all()


def test_ends_are_the_first_and_last_quarter():
    assert ends([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0]) == (1.5, 8.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reasoning_pays(tmp_path):
    """The bars of the quick start, at its own size."""
    rows = {name: row["ndcg@10"] for name, row in run(tmp_path).items()}
    after = rows["reasoned, after RecPO"]
    assert after >= 5 * rows["direct, trained"]
    assert after >= 3 * max(rows[name] for name in METHODS[:3])
    assert after >= 0.85 * rows["best possible"]
    log = [json.loads(line) for line in (tmp_path / "recpo/metrics.jsonl").read_text().splitlines()]
    before, after = ends([record["reward"] for record in log if "reward" in record])
    assert after > 1.5 * before


def test_threads_are_as_they_were(first):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(ValueError, match="holds a finished quick start"):
            run(first[0], seed=1, sizes=TOY)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_lines_come_now_and_then_and_are_plain(capsys):
    lines = StepLines("RecPO", 3, ("reward", "completions/mean_length"), every=0.0)
    lines({"step": 2, "reward": 0.25, "completions/mean_length": 12.5, "loss": 1.0})
    assert capsys.readouterr().out == "  RecPO: step 2 of 3, reward 0.25, mean_length 12.50\n"
    lines = StepLines("RecPO", 3, ("reward",), every=60.0)
    lines({"step": 2, "reward": 0.25})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stage", ["reasoning_sft", "contrastive", "recpo"])
def test_sigterm_stops_it_and_the_same_call_goes_on(first, tmp_path, capfd, monkeypatch, stage):
    step = RecPOTrainer._train_step

    def told_to_end(self, number):
        if self.config.objective == stage and number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(RecPOTrainer, "_train_step", told_to_end)
        with pytest.raises(RunStopped, match="stopped by SIGTERM after step 2"):
            run(tmp_path, seed=1, sizes=TOY)
    out = capfd.readouterr().out
    assert "| reasoned, after RecPO |" not in out and not (tmp_path / "results.json").exists()
    assert run(tmp_path, seed=1, sizes=TOY) == first[1]
    again = capfd.readouterr()
    assert ("warm-up:" in again.out) == (stage == "reasoning_sft") and again.err == ""
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

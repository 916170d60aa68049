"""What a run measures of its reasonings, and that measuring changes nothing."""

from __future__ import annotations

import dataclasses
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from _support.planted import PlantedEngine, name, planted
from _support.toy import toy_dataset
from _support.training import RUN, lines, run, same, toy_trainer, two

from r2ec_fast.config import RecPOConfig
from r2ec_fast.data import RecDataset
from r2ec_fast.eval.reasoning import ReasoningProbe
from r2ec_fast.train import distributed
from r2ec_fast.train.fault_tolerance import TokenBudget
from r2ec_fast.train.validation import Validation

NEW = ("readiness/", "groups/", "eval_valid_reasoned_minus_direct")


def without_diagnosis(records: list[dict]) -> list[dict]:
    kept = [{k: v for k, v in record.items() if not k.startswith(NEW)} for record in records]
    return [record for record in kept if set(record) != {"step"}]


def test_a_run_is_the_same_with_and_without_the_diagnosis(tmp_path):
    changes = {"lora_dropout": 0.3}  # draws from torch's generator
    on, parameters = run(tmp_path / "on", **changes, diagnostic_samples=8)
    off, others = run(tmp_path / "off", **changes, eval_direct=False)
    same(parameters, others, rtol=0, atol=0)
    with_it, without = lines(tmp_path / "on"), lines(tmp_path / "off")
    assert without_diagnosis(with_it) == without
    assert len(with_it) == len(without) + 1
    assert {k: v for k, v in on.items() if not k.startswith(NEW)} == off


def test_an_engine_that_draws_from_the_generator_does_not_move_it(tmp_path):
    trainer = toy_trainer(tmp_path, diagnostic_samples=8)
    engine, drawn = trainer.engine.generate, []

    def generate(*arguments, **settings):
        drawn.append(torch.rand(3))
        return engine(*arguments, **settings)

    trainer.engine.generate = generate
    trainer.table.refresh(0)
    before = torch.get_rng_state()
    trainer.validation.check_readiness(trainer.run_log)
    trainer.validation.groups()
    assert len(drawn) == 3
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_logged_and_when(tmp_path, caplog):
    caplog.set_level(logging.INFO, "r2ec_fast")
    run(tmp_path, diagnostic_samples=8)
    first, *rest = lines(tmp_path)
    assert first["step"] == 0 and first["readiness/examples"] == 8
    assert all(key == "step" or key.startswith("readiness/") for key in first)
    assert not any(key.startswith("readiness/") for record in rest for key in record)
    said = [r.getMessage() for r in caplog.records if "before RecPO: " in r.getMessage()]
    assert len(said) == 1 and "reasonings of 8 examples" in said[0]
    validations = [record for record in rest if "eval_valid_ndcg@10" in record]
    assert [record["step"] for record in validations] == [2, 4]
    for record in validations:
        assert 0 <= record["groups/best_beats_direct"] <= 1
        assert record["eval_valid_reasoned_minus_direct_ndcg@10/se"] > 0
    assert not any("groups/best_beats_direct" in r for r in rest if r not in validations)


def test_the_paired_difference_is_that_of_two_evaluations(tmp_path):
    trainer = toy_trainer(tmp_path)
    reasoned, direct = (trainer.evaluate(reasoning=mode) for mode in (True, False))
    gap = reasoned["eval_valid_ndcg@10"] - direct["eval_valid_ndcg@10"]
    assert gap != 0
    found = reasoned["eval_valid_reasoned_minus_direct_ndcg@10"]
    assert found == pytest.approx(gap, abs=1e-12)
    # pairs: less uncertain than the difference of two independent means
    errors = [metrics["eval_valid_ndcg@10/se"] for metrics in (reasoned, direct)]
    assert 0 < reasoned["eval_valid_reasoned_minus_direct_ndcg@10/se"] < sum(errors)
    assert not any("minus" in key for key in direct)
    trainer.config.eval_direct = False
    assert not any("minus" in key for key in trainer.evaluate(reasoning=True))


@pytest.mark.parametrize(
    "changes", [{"objective": "contrastive", "diagnostic_samples": 8}, {"diagnostic_samples": 0}]
)
def test_no_diagnosis_where_none_is_wanted(tmp_path, changes):
    run(tmp_path, **changes, max_steps=1)
    keys = {key for record in lines(tmp_path) for key in record}
    assert "eval_valid_ndcg@10" in keys
    assert not any(key.startswith(("readiness/", "groups/")) for key in keys)


def test_a_resumed_run_does_not_check_again(tmp_path):
    run(tmp_path / "whole", diagnostic_samples=8)
    run(tmp_path / "cut", diagnostic_samples=8, max_steps=3)
    wanted = str(tmp_path / "cut" / "checkpoint-2")
    run(tmp_path / "cut", diagnostic_samples=8, resume_from_checkpoint=wanted)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert sum("readiness/examples" in record for record in lines(tmp_path / "cut")) == 1


def test_two_processes_find_what_one_does(tmp_path):
    changes = {"max_steps": 1, "diagnostic_samples": 7}
    run(tmp_path / "one", **changes, per_device_train_batch_size=8)
    two(tmp_path / "two", "recpo", changes)
    (one, *_, valid), (both, *_, valid_of_both) = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert both == pytest.approx(one, rel=1e-6)
    assert valid_of_both == pytest.approx(valid, rel=1e-6)
    assert "groups/best_beats_direct" in valid


def test_a_user_alone_is_diagnosed_without_a_swap(tmp_path):
    trainer = toy_trainer(tmp_path, diagnostic_samples=8)
    data = trainer.data
    trainer.validation.data = dataclasses.replace(data, valid=data.valid[:1])
    trainer.table.refresh(0)
    trainer.validation.check_readiness(trainer.run_log)
    (record,) = lines(tmp_path)
    assert record["readiness/examples"] == 1
    assert "readiness/own_minus_swapped_ndcg@10" not in record


def test_a_run_without_validation_examples_begins(tmp_path):
    trainer = toy_trainer(tmp_path, diagnostic_samples=8)
    data = trainer.data
    trainer.validation.data = dataclasses.replace(data, valid=data.valid[:0])
    trainer.validation.check_readiness(trainer.run_log)
    assert trainer.validation.groups() == {}
    assert not (tmp_path / "metrics.jsonl").exists()


# ---- the warning --------------------------------------------------------------------------------


class Log:
    """Keeps what would be written to metrics.jsonl."""

    def __init__(self) -> None:
        self.records: list[dict] = []

    def write(self, record: dict, shown: str | None = None) -> None:
        self.records.append(record)


def planted_validation(*, reads: bool, right: bool, cut: bool = False):
    """The planted world, whose sampled reasonings name the target (``right``) or an item that does
    not help anyone, the first of three in either case."""
    model, assembler, data = planted(reads=reads)
    targets = data.target(data.valid)
    wrong = int(np.setdiff1d(np.arange(1, 16), targets)[0])
    rows = {x: name(t if right else wrong) for x, t in enumerate(targets)}
    sampled = {x: [row, name(wrong), name(wrong, before=1)] for x, row in rows.items()}
    every = [(x, g) for x in range(12) for g in range(3)] if cut else []
    engine = PlantedEngine(assembler.builder.marker_ids, rows, sampled, every)
    config = RecPOConfig(num_generations=3, diagnostic_samples=12)
    return Validation(model, assembler, data, config, engine, TokenBudget(4096))


def warned(validation: Validation, caplog) -> tuple[dict, str]:
    caplog.clear()
    run_log = Log()
    validation.check_readiness(run_log)
    (record,) = run_log.records
    texts = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(texts) <= 1
    return record, "".join(texts)


def test_no_warning_where_reasonings_decide(caplog):
    record, text = warned(planted_validation(reads=True, right=True), caplog)
    assert text == ""
    assert record["readiness/own_minus_swapped_ndcg@10"] > 0.1
    assert record["readiness/reasoned_ndcg@10"] == 1.0


def test_a_warning_where_the_item_head_does_not_read(caplog):
    record, text = warned(planted_validation(reads=False, right=True), caplog)
    assert record["readiness/own_minus_swapped_ndcg@10"] == 0.0
    assert "the item head does not seem to read what a reasoning says" in text
    assert "in only 0% of the groups does the best of 3 reasonings" in text
    assert 'objective="reasoning_sft"' in text


def test_a_warning_where_no_reasoning_helps(caplog):
    _, text = warned(planted_validation(reads=True, right=False), caplog)
    assert "in only 0% of the groups" in text


def test_a_warning_where_reasonings_are_cut(caplog):
    _, text = warned(planted_validation(reads=True, right=True, cut=True), caplog)
    assert "100% of the reasonings are cut at max_completion_length" in text
    assert "in only" not in text and "does not seem to read" not in text


def test_reasonings_are_swapped_across_processes(monkeypatch):
    """Two processes of five and seven examples, as threads."""
    validation = planted_validation(reads=True, right=True)
    whole = validation._readiness()
    assert whole["own_minus_swapped_ndcg@10"] > 0.1
    own, box, barrier = threading.local(), [None, None], threading.Barrier(2, timeout=60)

    def gather(value):
        box[own.rank] = value
        barrier.wait()
        every = list(box)
        barrier.wait()
        return every

    def process(rank: int) -> dict:
        own.rank = rank
        return validation._readiness()

    monkeypatch.setattr(distributed, "own_part", lambda x: x[5:] if own.rank else x[:5])
    monkeypatch.setattr(distributed, "gather_objects", gather)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, range(2))) == [whole, whole]


def test_the_figures_are_those_of_the_probe(tmp_path):
    trainer = toy_trainer(tmp_path, diagnostic_samples=8)
    trainer.table.refresh(0)
    trainer.validation.check_readiness(trainer.run_log)
    (record,) = lines(tmp_path)
    data: RecDataset = toy_dataset()
    config = RecPOConfig(**RUN | {"diagnostic_samples": 8})
    probe = ReasoningProbe(trainer.model, trainer.assembler, data, trainer.engine, config)
    examples = trainer.validation._sample()
    figures = {f"readiness/{k}": v for k, v in probe.figures(examples).items()}
    assert record == pytest.approx({"step": 0, **figures})

"""Which rows of the item table are encoded anew, and that their ages are told."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _support.toy import toy_dataset, toy_model
from _support.training import lines, run, same

from r2ec_fast.config import RecPOConfig
from r2ec_fast.train.fault_tolerance import TokenBudget
from r2ec_fast.train.item_table import CatalogTable

ROLLING = {"refresh_mode": "rolling", "refresh_steps": 4, "eval_steps": 0}  # 4 of 16 rows a step


@pytest.fixture
def table():
    model, catalog = toy_model(), toy_dataset().data.catalog
    config = RecPOConfig(refresh_mode="rolling", refresh_steps=5)
    builder = model.prompt_builder(catalog)
    table = CatalogTable(model, builder, config, len(catalog), TokenBudget(1024))
    table.refresh(0)
    return table


def changed_rows(table, before):
    return (table.model.index.items != before).any(1).nonzero()[:, 0].tolist()


def test_the_oldest_rows_are_encoded_with_the_new_weights(table):
    before = table.model.index.items
    table.wrote([0, 2], 1)
    with torch.no_grad():
        for parameter in table.model.language_model.model.layers.parameters():
            parameter.mul_(1.5)
    table.roll(1)
    oldest = [1, 3, 4, 5]  # ceil(16 / 5), and neither of the rows just written
    assert changed_rows(table, before) == oldest
    fresh = table.model.encode_rows(table.builder.items_ids(oldest))
    torch.testing.assert_close(table.model.index.items[oldest], fresh.float())
    assert table.written_at.tolist() == [1] * 6 + [0] * 10
    table.roll(2)
    assert changed_rows(table, before) == [1, *range(3, 10)]


def test_sampled_negatives_join_the_targets(table):
    users = [SimpleNamespace(targets=np.array([3, 3, 9]))]
    assert sorted(table.candidate_rows(users, 1)) == [3, 9]
    table.config.sampled_negatives = 5
    drawn = [set(table.candidate_rows(users, step)) for step in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all({3, 9} < ids and len(ids) <= 7 for ids in drawn)
    table.config.sampled_negatives = 99
    assert len(table.candidate_rows(users, 1)) == 16


@pytest.mark.parametrize("objective", ["contrastive", "recpo"])
def test_training_with_sampled_negatives_scores_more_candidates(tmp_path, objective):
    settings = {"max_steps": 1, "eval_steps": 0, "learning_rate": 1e-9}
    few, _ = run(tmp_path / "few", objective, **settings)
    many, _ = run(tmp_path / "many", objective, sampled_negatives=12, **settings)
    key = "item_log_prob" if objective == "recpo" else "in_batch_probability"
    first = [lines(tmp_path / name)[0][key] for name in ("few", "many")]
    assert first[1] < first[0]


def test_no_row_grows_older_than_refresh_steps(table):
    draw = np.random.default_rng(0)
    oldest = 0
    for step in range(1, 40):
        table.wrote(draw.choice(16, 3, replace=False), step - 1)
        ages = table.staleness(step)
        assert ages["item_table_age"] == step - 1
        assert ages["item_table/max_age"] == (step - 1 - table.written_at).max()
        assert ages["item_table/mean_age"] == pytest.approx((step - 1 - table.written_at).mean())
        oldest = max(oldest, ages["item_table/max_age"])
        table.roll(step)
    assert 0 < oldest <= 5


def test_a_run_logs_the_ages_of_its_rows(tmp_path):
    run(tmp_path / "rolling", max_steps=8, **ROLLING)
    records = [r for r in lines(tmp_path / "rolling") if "reward" in r]
    assert [r["item_table_age"] for r in records] == list(range(8))
    assert max(r["item_table/max_age"] for r in records) <= 4
    for fresh in (False, True):
        folder = tmp_path / f"full-{fresh}"
        run(folder, max_steps=8, refresh_steps=0, eval_steps=0, fresh_targets=fresh)
        last = [r for r in lines(folder) if "reward" in r][-1]
        assert last["item_table/max_age"] == 7
        # with fresh_targets the rows that a step wrote are younger
        assert (last["item_table/mean_age"] < 7) == fresh


def test_a_resumed_run_goes_on_with_the_rolling_refresh(tmp_path):
    metrics, parameters = run(tmp_path / "whole", max_steps=6, **ROLLING)
    run(tmp_path / "cut", max_steps=3, **ROLLING)
    checkpoint = str(tmp_path / "cut" / "checkpoint-2")
    resumed, same_parameters = run(
        tmp_path / "cut", max_steps=6, resume_from_checkpoint=checkpoint, **ROLLING
    )
    assert resumed == metrics
    same(parameters, same_parameters, rtol=0, atol=0)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_rolling_needs_a_number_of_steps():
    with pytest.raises(ValueError, match="refresh_steps: refresh_mode='rolling' needs"):
        RecPOConfig(refresh_mode="rolling", refresh_steps=0)
    with pytest.raises(ValueError, match="refresh_mode: expected one of full, rolling"):
        RecPOConfig(refresh_mode="all")

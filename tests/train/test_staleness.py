"""What the age of the table's rows adds to the rewards: measured, and small by default."""

import numpy as np
import pytest
import torch
from _support.training import lines, run, toy_trainer

FAST = {"max_steps": 6, "eval_steps": 0, "refresh_steps": 3, "learning_rate": 0.05}


def biases(folder):
    return {
        line["step"]: line["reward/staleness_bias"]
        for line in lines(folder)
        if "reward/staleness_bias" in line
    }


def test_it_is_measured_at_every_whole_refresh(tmp_path):
    run(tmp_path, "recpo", **FAST)
    assert sorted(biases(tmp_path)) == [3, 6]


def test_a_table_that_is_never_old_is_not_measured(tmp_path):
    run(tmp_path, "recpo", **{**FAST, "refresh_steps": 1})
    assert not biases(tmp_path)


def test_contrastive_training_has_no_reward(tmp_path):
    run(tmp_path, "contrastive", **FAST)
    assert not biases(tmp_path)


@pytest.mark.parametrize("fresh_targets", [False, True])
def test_it_is_the_reward_of_an_old_table_less_that_of_a_fresh_one(tmp_path, fresh_targets):
    changes = {**FAST, "max_steps": 2, "fresh_targets": fresh_targets}
    trainer = toy_trainer(tmp_path, "recpo", **changes)
    trainer.train()
    model, table, update = trainer.model, trainer.table, trainer.update
    experience, fresh = trainer.refresh.latest
    whole = model.encode_rows(trainer.builder.items_ids(range(len(table.written_at)))).float()
    old = -whole  # every item is where its opposite should be
    model.set_items(old)

    def mean_reward(rows):
        model.set_items(rows)
        return update.rewards(experience, update.read_outs(experience)).double().mean().item()

    found = old.clone()
    found[fresh] = whole[fresh]
    expected = mean_reward(found) - mean_reward(whole)
    model.set_items(old)
    measured = trainer.refresh(trainer.step)["reward/staleness_bias"]
    assert measured == pytest.approx(expected, abs=1e-6) and abs(expected) > 1e-3
    torch.testing.assert_close(model.index.items, whole)
    assert (table.written_at == trainer.step).all()
    assert np.isfinite(measured)

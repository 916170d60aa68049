"""Groups of tied rewards are sampled again: which, with what keys, and at what cost."""

import numpy as np
import pytest
import torch
from _support.training import lines, run, same, toy_trainer, two

from r2ec_fast.rollout import Rollouts
from r2ec_fast.train.dynamic_sampling import (
    ResamplingCost,
    replace_groups,
    resample_ties,
    round_key,
)

# the reward is the rank's part alone: groups of equal ranks tie
RUN = {"reward_softmax_weight": 0.0, "max_completion_length": 2, "max_steps": 2, "eval_steps": 0}
ROUNDS = {**RUN, "dynamic_sampling_rounds": 3}


def rollouts(rows, reasons=None) -> Rollouts:
    lengths = [len(row) for row in rows]
    values = np.concatenate(rows).astype(np.int64)
    return Rollouts(
        values=values,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        sampled=np.ones(len(values), bool),
        log_prob=-values.astype(np.float32),
        finish_reason=reasons or ["answer"] * len(rows),
    )


def test_groups_are_replaced_whole():
    old = rollouts([[1], [2, 2], [3], [4], [5, 5, 5], [6]])
    new = rollouts([[7, 7], [8], [9], [10]], ["eos"] * 4)
    out = replace_groups(old, np.array([0, 2]), new)
    assert [out.row(r).tolist() for r in range(6)] == [[7, 7], [8], [3], [4], [9], [10]]
    assert out.finish_reason == ["eos", "eos", "answer", "answer", "eos", "eos"]
    np.testing.assert_array_equal(out.log_prob, -out.values)


@pytest.fixture
def step(tmp_path):
    trainer = toy_trainer(tmp_path, **ROUNDS)
    trainer.table.refresh(0)
    users = trainer.examples.batch(1, 0)
    return trainer, users


def test_only_tied_groups_are_sampled_again_with_keys_of_their_own(step):
    trainer, users = step
    asked = []

    def generate(part, round_):
        asked.append((round_, part.keys))
        return trainer._generate(part, round_key(1, round_))

    first, cost = trainer._generate(users, 1), ResamplingCost()
    out = resample_ties(users, first, update=trainer.update, generate=generate, rounds=3, cost=cost)
    assert asked and len(asked) <= 3
    assert [round_ for round_, _ in asked] == list(range(1, len(asked) + 1))
    tied = set(asked[0][1])
    assert 0 < len(tied) < len(users.keys)  # the toy has both kinds
    for i, key in enumerate(users.keys):
        rows = [2 * i, 2 * i + 1]
        equal = all(np.array_equal(out.row(r), first.row(r)) for r in rows)
        assert equal == (key not in tied)
    assert cost.resampled == sum(len(keys) for _, keys in asked)
    assert cost.tokens > 0 and cost.tied <= len(tied)


def test_a_run_with_it_is_deterministic_and_logs_the_cost(tmp_path):
    _, without = run(tmp_path / "without", **RUN)
    _, first = run(tmp_path / "a", **ROUNDS)
    _, again = run(tmp_path / "b", **ROUNDS)
    same(first, again, rtol=0, atol=0)
    assert any(not torch.equal(first[n], without[n]) for n in first)
    for plain, record in zip(lines(tmp_path / "without"), lines(tmp_path / "a"), strict=True):
        if "reward" not in record:
            continue
        assert record["dynamic_sampling/resampled_groups"] >= 1
        assert record["dynamic_sampling/extra_tokens"] >= 2
        assert "dynamic_sampling/extra_tokens" not in plain
        assert record["frac_reward_zero_std"] == record["dynamic_sampling/tied_groups"] / 4


def test_two_processes_resample_as_one_does(tmp_path):
    _, parameters = run(tmp_path / "one", **ROUNDS, per_device_train_batch_size=8)
    for _, got in two(tmp_path / "two", "recpo", ROUNDS):
        same(parameters, got, rtol=1e-5, atol=1e-7)
    names = [f"dynamic_sampling/{n}" for n in ("resampled_groups", "tied_groups", "extra_tokens")]
    one, both = (lines(tmp_path / name)[0] for name in ("one", "two"))
    assert [one[n] for n in names] == [both[n] for n in names]

"""Ranking metrics against the written-out definition and against ranx."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch

from r2ec_fast.eval.comparison import differences, load_ranks, save_ranks
from r2ec_fast.eval.metrics import metrics_table, paired_differences, ranking_metrics
from r2ec_fast.utils.atomic_files import check_writable


def test_three_ranks_by_hand():
    metrics = ranking_metrics([1, 4, 11], ks=(5, 10))
    assert metrics["hit_rate@5"] == pytest.approx(2 / 3)
    assert metrics["ndcg@5"] == pytest.approx((1 + 1 / math.log2(5)) / 3)
    assert metrics["mrr@10"] == pytest.approx((1 + 1 / 4) / 3)
    spread = math.sqrt(((1 - 2 / 3) ** 2 * 2 + (2 / 3) ** 2) / 2)
    assert metrics["hit_rate@5/se"] == pytest.approx(spread / math.sqrt(3))
    assert metrics["examples"] == 3


def test_a_rank_equal_to_k_counts_and_one_above_does_not():
    assert ranking_metrics([5], ks=(5,))["hit_rate@5"] == 1
    assert ranking_metrics([6], ks=(5,))["hit_rate@5"] == 0


def test_keys_carry_the_prefix_and_tensors_are_taken():
    metrics = ranking_metrics(torch.tensor([1, 2]), ks=(10,), prefix="eval_valid_")
    assert set(metrics) == {
        "eval_valid_hit_rate@10",
        "eval_valid_hit_rate@10/se",
        "eval_valid_ndcg@10",
        "eval_valid_ndcg@10/se",
        "eval_valid_mrr@10",
        "eval_valid_mrr@10/se",
        "eval_valid_examples",
    }


def test_one_example_has_no_standard_error():
    assert math.isnan(ranking_metrics([3])["ndcg@10/se"])


@pytest.mark.parametrize(
    ("ranks", "ks", "message"),
    [
        ([], (5,), r"ranks must have shape \[X\] with X >= 1, got shape \[0\]"),
        ([[1, 2]], (5,), r"got shape \[1, 2\]"),
        ([1.0, 2.0], (5,), "ranks must be integers, got float64"),
        ([1, 0], (5,), "ranks start at 1, got 0"),
        ([1], (0,), "ks must be at least 1, got 0"),
    ],
)
def test_bad_ranks_are_refused(ranks, ks, message):
    with pytest.raises(ValueError, match=message):
        ranking_metrics(np.array(ranks) if ranks else np.array([], dtype=np.int64), ks=ks)


def test_examples_of_one_user_count_as_one():
    # hits 1 1 0 | 0: mean 1/2, sums of a user's deviations 1/2 and -1/2, so sqrt(2 * 1/2) / 4
    metrics = ranking_metrics([1, 2, 9, 9], ks=(5,), users=["a", "a", "a", "b"])
    assert metrics["hit_rate@5"] == 0.5
    assert metrics["hit_rate@5/se"] == pytest.approx(1 / 4)
    # examples that repeat within a user tell nothing new
    ranks = np.array([1, 4, 11, 2])
    once = ranking_metrics(ranks, users=[7, 3, 5, 9])
    assert once == pytest.approx(ranking_metrics(ranks))
    thrice = ranking_metrics(np.repeat(ranks, 3), users=np.repeat([7, 3, 5, 9], 3))
    assert thrice["ndcg@10/se"] == pytest.approx(once["ndcg@10/se"])
    paired = paired_differences(ranks, ranks[::-1], users=[1, 1, 2, 2])
    assert paired["hit_rate@5"] == 0
    assert paired["hit_rate@5/se"] == pytest.approx(1 / 2)  # 0 1 -1 0: sums of a user 1 and -1


def test_one_user_has_no_standard_error_and_users_match_the_ranks():
    assert math.isnan(ranking_metrics([3, 4], users=["a", "a"])["ndcg@10/se"])
    with pytest.raises(ValueError, match=r"users must have shape \[2\], got \[3\]"):
        ranking_metrics([3, 4], users=["a", "b", "c"])


def test_paired_differences_by_hand():
    # hit@5: 1 1 0 against 1 0 0; mrr@5: 1, 1/2, 0 against 1/2, 0, 0
    found = paired_differences([1, 2, 9], [2, 7, 9], ks=(5,))
    assert found["hit_rate@5"] == pytest.approx(1 / 3)
    assert found["hit_rate@5/se"] == pytest.approx(1 / 3)
    assert found["mrr@5"] == pytest.approx(1 / 3)
    assert found["mrr@5/se"] == pytest.approx(math.sqrt((2 / 36 + 1 / 9) / 2 / 3))
    assert found["examples"] == 3


def test_methods_that_agree_on_most_examples_are_told_apart_better_by_pairs():
    generator = np.random.default_rng(3)
    ranks = generator.integers(1, 40, 500)
    other = ranks.copy()
    other[:60] += 2
    single, paired = ranking_metrics(ranks), paired_differences(ranks, other)
    assert paired["ndcg@10/se"] < single["ndcg@10/se"] / 3
    gap = single["ndcg@10"] - ranking_metrics(other)["ndcg@10"]
    assert paired["ndcg@10"] == pytest.approx(gap)


def test_differences_need_as_many_ranks():
    with pytest.raises(ValueError, match=r"other must have shape \[2\] like ranks, got \[3\]"):
        paired_differences([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="other start at 1, got 0"):
        paired_differences([1, 2], [1, 0])


def ranks_frame(**methods: list[int]) -> pl.DataFrame:
    keys = {"user_id": ["07", "8"], "position": [3, 1], "item_id": ["a", "1e5"]}
    return pl.DataFrame({**keys, **methods})


def test_ranks_come_back_from_their_file(tmp_path):
    table = ranks_frame(popularity=[1, 2], direct=[3, 4])
    save_ranks(table, tmp_path / "new" / "ranks.csv")
    assert load_ranks(tmp_path / "new" / "ranks.csv").equals(table)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["ranks.csv"]


def test_differences_name_both_sides():
    now = ranks_frame(direct=[1, 2], reasoned=[1, 1])
    assert set(differences(now)) == {"reasoned - direct"}
    assert differences(ranks_frame(direct=[1, 2])) == {}
    found = differences(now, ranks_frame(reasoned=[2, 1], other=[1, 1]))
    assert set(found) == {"reasoned - direct", "reasoned - before"}
    assert found["reasoned - before"]["mrr@5"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="before: expected ranks by any of direct, reasoned"):
        differences(now, ranks_frame(other=[1, 1]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "the columns user_id, position, item_id"),
        ("user_id,position,item_id\nu,1,i\n", "one of whole ranks for every method"),
        ("user_id,position,item_id,direct\nu,1,i,2.5\n", "one of whole ranks"),
        ("user_id,position,item_id,direct\nu,one,i,2\n", "ranks_file: cannot read"),
        ("", "ranks_file: cannot read"),
    ],
)
def test_a_file_that_holds_no_ranks_is_refused(text, message, tmp_path):
    (tmp_path / "ranks.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_ranks(tmp_path / "ranks.csv", "ranks_file")


def test_ranks_that_cannot_be_written_name_the_argument(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="ranks_file: cannot write to .*ranks.csv"):
        save_ranks(ranks_frame(direct=[1, 2]), tmp_path / "file" / "ranks.csv", "ranks_file")
    with pytest.raises(OSError, match="ranks_file: cannot write to .*: Is a directory"):
        check_writable(tmp_path, "ranks_file")


RANX = """
import json, sys
import ranx
qrels, run, names = json.load(sys.stdin)
values = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), names)
print(json.dumps({name: float(value) for name, value in values.items()}))
"""


def test_agrees_with_ranx():
    pytest.importorskip("ranx")
    generator = np.random.default_rng(7)
    scores = generator.permuted(np.tile(np.arange(60.0), (200, 1)), axis=1)
    targets = generator.integers(0, 60, 200)
    ranks = 1 + (scores > scores[np.arange(200), targets][:, None]).sum(axis=1)
    qrels = {f"q{i}": {f"d{t}": 1} for i, t in enumerate(targets)}
    run = {f"q{i}": {f"d{j}": s for j, s in enumerate(row)} for i, row in enumerate(scores)}
    names = [f"{metric}@{k}" for metric in ("hit_rate", "ndcg", "mrr") for k in (5, 10, 20)]
    # its compiled kernels take 40 s to build, the same code interpreted takes 2 s
    done = subprocess.run(
        [sys.executable, "-c", RANX],
        input=json.dumps([qrels, run, names]),
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs, ours = json.loads(done.stdout.splitlines()[-1]), ranking_metrics(ranks)
    assert set(theirs) == set(names)
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-12), name
        assert 0 < ours[name] < 1


def test_table_shows_every_method_and_its_error():
    rows = {"popularity": ranking_metrics([1, 30]), "one": {"ndcg@10": 0.5, "examples": 1.0}}
    lines = metrics_table(rows, columns=("ndcg@10", "mrr@10")).split("\n")
    assert lines[0] == "| method | ndcg@10 | mrr@10 | examples |"
    assert lines[2] == "| popularity | 0.5000 ± 0.5000 | 0.5000 ± 0.5000 | 2 |"
    assert lines[3] == "| one | 0.5000 | – | 1 |"
    with pytest.raises(ValueError, match="at least one method"):
        metrics_table({})

"""Strata of examples, and the metrics of each."""

from __future__ import annotations

import numpy as np
import pytest
from _support.histories import dataset, random_dataset

from r2ec_fast.eval.baselines import ItemKNN
from r2ec_fast.eval.beyond_accuracy import ItemCounts
from r2ec_fast.eval.metrics import ranking_metrics
from r2ec_fast.eval.strata import strata, strata_table, stratified_metrics


def test_strata_by_hand():
    # training events: item 0 three times, items 1 to 5 once or twice, 6 and 7 never
    long = [0, 1, 2, 3, 4, 5] * 4
    histories = [[0, 1, 0], [2, 3, 6], [4, 5, 1, 5, 4, 0, 7], [0, *long]]
    train = [(0, 1), (1, 1), (2, 1)]
    test = [(0, 2), (1, 2), (2, 4), (2, 5), (2, 6), (3, 20), (3, 19)]
    data = dataset(histories, 8, train, test)
    data.data.item[:3] = [0, 0, 0]
    masks = strata(data, data.test, ItemCounts.of(data))
    # warm items 0, 2, 3, 4, 5; a fifth of them: item 0. Targets: 0, 6, 4, 0, 7, 1, 0
    assert data.target(data.test).tolist() == [0, 6, 4, 0, 7, 1, 0]
    assert {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()} == {
        "history 1-4": [0, 1, 2],
        "history 5-19": [3, 4, 6],
        "history 20+": [5],
        "target in the head": [0, 3, 6],
        "target in the tail": [2],
        "cold target": [1, 4, 5],
    }


def test_metrics_of_a_stratum_are_those_of_its_examples():
    ranks, users = np.array([1, 3, 20, 2]), np.array([7, 7, 8, 9])
    masks = {"some": np.array([True, False, True, True]), "none": np.zeros(4, dtype=bool)}
    found = stratified_metrics(ranks, masks, users=users)
    alone = ranking_metrics(ranks[[0, 2, 3]], users=users[[0, 2, 3]])
    assert found == {f"some/{key}": value for key, value in alone.items()} | {"none/examples": 0}


def test_the_table_has_a_row_for_every_stratum():
    masks = {"cold target": np.array([True, False]), "none": np.zeros(2, dtype=bool)}
    rows = {}
    for name, ranks in (("a", [1, 11]), ("b", [3, 1])):
        rows[name] = ranking_metrics(ranks) | stratified_metrics(ranks, masks)
    assert strata_table(rows).splitlines() == [
        "| ndcg@10 | examples | a | b |",
        "|---|---:|---:|---:|",
        "| all | 2 | 0.5000 ± 0.5000 | 0.7500 ± 0.2500 |",
        "| cold target | 1 | 1.0000 | 0.5000 |",
        "| none | 0 | – | – |",
    ]
    with pytest.raises(ValueError, match="rows must hold at least one method"):
        strata_table({})


@pytest.mark.peers
def test_rectools_gives_the_same_for_each_stratum():
    pytest.importorskip("rectools", reason="needs the extra `baselines`")
    import pandas as pd
    from rectools import Columns
    from rectools.metrics import MRR, NDCG, HitRate

    data = random_dataset(8)
    baseline, examples = ItemKNN(data), data.test
    values, offsets = data.exclude(examples)
    target = data.target(examples)
    new = [target[i] not in values[offsets[i] : offsets[i + 1]] for i in range(len(target))]
    examples = examples[np.array(new)]  # RecTools' lists never hold what the user had
    lists, target = baseline.top_items(examples, 10), data.target(examples)
    masks = strata(data, examples, ItemCounts.of(data))
    found = stratified_metrics(baseline.ranks(examples), masks)
    for name, mask in masks.items():
        if not mask.any():
            continue
        chosen = lists[mask]
        reco = pd.DataFrame(
            {
                Columns.User: np.repeat(np.arange(len(chosen)), 10),
                Columns.Item: chosen.ravel(),
                Columns.Rank: np.tile(np.arange(1, 11), len(chosen)),
            }
        )
        bought = pd.DataFrame({Columns.User: np.arange(len(chosen)), Columns.Item: target[mask]})
        metrics = (
            ("hit_rate", HitRate(10)),
            ("ndcg", NDCG(10, divide_by_achievable=True)),
            ("mrr", MRR(10)),
        )
        for key, metric in metrics:
            assert found[f"{name}/{key}@10"] == pytest.approx(metric.calc(reco, bought), rel=1e-12)

"""Coverage, novelty, diversity and popularity: by hand, and against RecTools."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
from _support.histories import dataset, random_dataset

from r2ec_fast.eval.baselines import ItemKNN
from r2ec_fast.eval.beyond_accuracy import ItemCounts, beyond_accuracy, text_vectors, words


def test_counts_are_of_training_events_alone():
    data = dataset([[0, 0, 1, 2], [0, 3], [4, 4]], 6, [(0, 1), (0, 2), (1, 1)], [(0, 3), (2, 1)])
    counts = ItemCounts.of(data)
    assert counts.events.tolist() == [3, 1, 0, 1, 0, 0]
    assert counts.users.tolist() == [2, 1, 0, 1, 0, 0]
    assert counts.num_users == 2  # the third has no training target


def test_two_lists_by_hand():
    counts = ItemCounts(np.array([6, 2, 1, 0]), np.array([4, 2, 1, 0]), num_users=4)
    vectors = sp.csr_array(np.array([[1.0, 0], [0.6, 0.8], [0, 1.0], [0, 0]]))
    found = beyond_accuracy(np.array([[0, 1, 2], [0, 3, -1]]), counts, vectors)
    novelty = [(0 + 1 + 2) / 3, (0 + 2) / 2]  # an item without users counts as one user's
    diversity = [(0.4 + 1 + 0.2) / 3, 1.0]
    arp = [(6 + 2 + 1) / 3, (6 + 0) / 2]
    assert found["coverage@3"] == 1.0
    for name, (a, b) in (("novelty", novelty), ("diversity", diversity), ("arp", arp)):
        assert found[f"{name}@3"] == pytest.approx((a + b) / 2)
        assert found[f"{name}@3/se"] == pytest.approx(abs(a - b) / 2)  # sd / sqrt(2)
    assert len(found) == 7


def test_one_item_has_no_diversity_and_coverage_counts_an_item_once():
    counts = ItemCounts(np.array([1, 1]), np.array([1, 1]), num_users=2)
    vectors = sp.csr_array(np.eye(2))
    found = beyond_accuracy(np.array([[1], [1], [1]]), counts, vectors)
    assert (found["diversity@1"], found["coverage@1"]) == (0.0, 0.5)


def test_lists_of_one_user_are_not_independent():
    counts = ItemCounts(np.array([5, 1, 3]), np.array([5, 1, 3]), num_users=5)
    vectors = sp.csr_array(np.eye(3))
    lists = np.array([[0], [0], [1], [2]])
    alone = beyond_accuracy(lists, counts, vectors)
    clustered = beyond_accuracy(lists, counts, vectors, users=["a", "a", "b", "c"])
    assert clustered["arp@1"] == alone["arp@1"] == 3.5
    # sums of a user's deviations: 3, -2.5, -0.5
    expected = math.sqrt(3 / 2 * (3**2 + 2.5**2 + 0.5**2)) / 4
    assert clustered["arp@1/se"] == pytest.approx(expected)


def test_text_vectors_by_hand():
    assert words("Amazon.com Gift-Card, É_2!") == ["amazon", "com", "gift", "card", "é", "2"]
    vectors = text_vectors(["Red tin tin", "red box", "!"]).toarray()
    red, rare = math.log(4 / 3) + 1, math.log(4 / 2) + 1  # in two texts of three, in one
    first = np.array([0, red, 2 * rare]) / math.hypot(red, 2 * rare)  # box, red, tin
    second = np.array([rare, red, 0]) / math.hypot(rare, red)
    np.testing.assert_allclose(vectors, [first, second, [0, 0, 0]], rtol=1e-12)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (np.zeros((0, 3), int), r"lists must have shape \[X, k\] with X, k >= 1, got shape \[0, 3"),
        (np.zeros(3, int), r"got shape \[3\]"),
        (np.array([[0, 2]]), r"expected ids in 0..1, or -1 for none, got 0..2"),
        (np.array([[-1, -1], [-1, -1]]), "expected an item in some row, got 2 empty rows"),
    ],
)
def test_errors_say_what_was_wrong(lists, message):
    counts = ItemCounts(np.array([1, 1]), np.array([1, 1]), num_users=1)
    with pytest.raises(ValueError, match=message):
        beyond_accuracy(lists, counts, sp.csr_array(np.eye(2)))


def test_empty_lists_count_for_nothing():
    counts = ItemCounts(np.array([3, 1, 2]), np.array([2, 1, 1]), num_users=2)
    vectors = sp.csr_array(np.eye(3))
    some = beyond_accuracy(np.array([[0, 1], [2, 1]]), counts, vectors, users=[5, 6])
    lists = np.array([[0, 1], [-1, -1], [2, 1]])
    assert beyond_accuracy(lists, counts, vectors, users=[5, 5, 6]) == some


@pytest.mark.peers
@pytest.mark.parametrize("k", [1, 4, 10])
def test_rectools_gives_the_same(k):
    pytest.importorskip("rectools", reason="needs the extra `baselines`")
    import pandas as pd
    from rectools import Columns
    from rectools.metrics import (
        AvgRecPopularity,
        CatalogCoverage,
        IntraListDiversity,
        MeanInvUserFreq,
    )
    from rectools.metrics.distances import PairwiseDistanceCalculator

    from r2ec_fast.data.splits import training_events

    data = random_dataset(7)
    text = ["red tin", "blue tin box", "!", "red red card", "card for a box"]
    vectors = text_vectors([text[i % 5] + " x" * (i % 3) for i in range(data.data.num_items)])
    lists = ItemKNN(data).top_items(data.test, k)
    lists[3, 1:] = -1  # a shorter one

    class Cosine(PairwiseDistanceCalculator):
        def _get_distances_for_item_pairs(self, items_0, items_1):
            return 1 - (vectors[items_0] * vectors[items_1]).sum(1)

    row, column = np.nonzero(lists >= 0)
    reco = pd.DataFrame(
        {Columns.User: row, Columns.Item: lists[row, column], Columns.Rank: column + 1}
    )
    users, items, _ = training_events(data)
    known = pd.DataFrame({Columns.User: users, Columns.Item: items})
    found = beyond_accuracy(lists, ItemCounts.of(data), vectors)
    coverage = CatalogCoverage(k, normalize=True).calc(reco, range(data.data.num_items))
    assert found[f"coverage@{k}"] == pytest.approx(coverage, rel=1e-12)
    assert found[f"novelty@{k}"] == pytest.approx(MeanInvUserFreq(k).calc(reco, known), rel=1e-12)
    assert found[f"arp@{k}"] == pytest.approx(AvgRecPopularity(k).calc(reco, known), rel=1e-12)
    diversity = IntraListDiversity(k, Cosine()).calc(reco)
    assert found[f"diversity@{k}"] == pytest.approx(diversity, rel=1e-12, abs=1e-12)

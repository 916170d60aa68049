"""Counting baselines: scores against loops over the events, ranks against a dense stable sort."""

from __future__ import annotations

import numpy as np
import pytest
from _support.histories import dataset, examples, random_dataset, training_sequences

from r2ec_fast.data import RecDataset
from r2ec_fast.eval import baselines
from r2ec_fast.eval.baselines import ItemKNN, Markov, Popularity, counting_baselines


def expected_scores(name: str, data: RecDataset, history: list[int]) -> np.ndarray:
    sequences, out = training_sequences(data), np.zeros(data.data.num_items)
    if name == "markov-1":
        for sequence in sequences.values():
            for a, b in zip(sequence, sequence[1:], strict=False):
                out[b] += a == history[-1]
    if name == "item-knn":
        users = [{u for u, s in sequences.items() if i in s} for i in range(len(out))]
        for j in set(history):
            for i in range(len(out)):
                if i != j and users[i] & users[j]:
                    out[i] += len(users[i] & users[j]) / np.sqrt(len(users[i]) * len(users[j]))
    return out


@pytest.mark.parametrize("kind", [Popularity, Markov, ItemKNN])
@pytest.mark.parametrize("block", [7, 1024])
def test_scores_are_the_counts(kind, block, monkeypatch):
    monkeypatch.setattr(baselines, "ITEMS_PER_BLOCK", block)
    data = random_dataset(1)
    baseline = kind(data)
    scores = baseline.scores(data.test).toarray()
    assert scores.shape == (len(data.test), 30)
    for i, (user, position) in enumerate(zip(data.test.user, data.test.position, strict=True)):
        history = data.data.item[data.data.offsets[user] :][:position].tolist()
        np.testing.assert_allclose(scores[i], expected_scores(kind.name, data, history), rtol=1e-12)


@pytest.mark.parametrize("kind", [Popularity, Markov, ItemKNN])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize("share", [None, 0.0, 0.1, 0.5, 1.0])
def test_ranks_are_those_of_a_stable_sort(kind, window, block, share, monkeypatch):
    monkeypatch.setattr(baselines, "EXAMPLES_PER_BLOCK", block)
    data = random_dataset(2)
    baseline = kind(data)
    include = None if share is None else np.random.default_rng(3).random(30) < share
    ranks = baseline.ranks(data.test, window=window, include=include)
    lists = baseline.top_items(data.test, 5, window=window, include=include)
    allowed = np.ones(30, dtype=bool) if include is None else include
    scores = baseline.scores(data.test).toarray()
    popularity = np.bincount(np.concatenate(list(training_sequences(data).values())), minlength=30)
    targets, repeats = data.target(data.test), 0
    for i, (user, position) in enumerate(zip(data.test.user, data.test.position, strict=True)):
        history = data.data.item[data.data.offsets[user] :][:position]
        seen = set((history if window is None else history[-window:]).tolist())
        repeats += targets[i] in seen
        order = [
            v
            for v in sorted(range(30), key=lambda v: (-scores[i, v], -popularity[v], v))
            if (v not in seen and allowed[v]) or v == targets[i]
        ]
        assert ranks[i] == 1 + order.index(targets[i])
        order = [v for v in order if v not in seen and allowed[v]][:5]
        assert lists[i].tolist() == order + [-1] * (5 - len(order))
    assert repeats > 0  # targets inside their own history are among the cases


def test_nothing_of_the_test_events_is_learnt():
    shared = [[0, 1, 2], [0, 1, 3], [0, 1, 2]]
    before = dataset(shared, 6, [(u, 1) for u in range(3)], [(u, 2) for u in range(3)])
    changed = [[0, 1, 5], [0, 1, 5], [0, 1, 5]]
    after = dataset(changed, 6, [(u, 1) for u in range(3)], [(u, 2) for u in range(3)])
    for kind in (Popularity, Markov, ItemKNN):
        one, two = kind(before), kind(after)
        np.testing.assert_array_equal(one.place, two.place)
        np.testing.assert_array_equal(
            one.scores(before.test).toarray(), two.scores(after.test).toarray()
        )


def test_a_user_without_training_examples_teaches_nothing():
    data = dataset([[0, 1, 2], [3, 4, 3]], 5, [(0, 1), (0, 2)], [(1, 1), (1, 2)])
    assert Popularity(data).place.tolist() == [0, 1, 2, 3, 4]
    assert Markov(data).scores(data.test).nnz == 0


def test_transitions_do_not_cross_users():
    data = dataset([[0, 1], [2, 3]], 4, [(0, 1), (1, 1)], [])
    dense = Markov(data).transitions.toarray()
    assert dense[0, 1] == dense[2, 3] == 1 and dense.sum() == 2


def test_knn_keeps_the_nearest_neighbours():
    histories = [[0, 1], [0, 1], [0, 2], [0, 3, 3]]
    data = dataset(histories, 4, [(0, 1), (1, 1), (2, 1), (3, 2)], [])
    kept = ItemKNN(data, neighbours=1).similarity.toarray()
    assert kept[0].tolist() == [0, 2 / np.sqrt(4 * 2), 0, 0]
    assert (np.count_nonzero(kept, axis=1) <= 1).all()
    with pytest.raises(ValueError, match="neighbours must be at least 1, got 0"):
        ItemKNN(data, neighbours=0)


def test_all_three_and_no_examples():
    data = random_dataset(3)
    names = [b.name for b in counting_baselines(data)]
    assert names == ["popularity", "markov-1", "item-knn"]
    assert Popularity(data).ranks(examples([])).shape == (0,)


@pytest.mark.parametrize("kind", [Popularity, Markov, ItemKNN])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_lists_are_the_head_of_a_stable_sort(kind, window, k, monkeypatch):
    monkeypatch.setattr(baselines, "EXAMPLES_PER_BLOCK", 16)
    data = random_dataset(5)
    baseline = kind(data)
    lists = baseline.top_items(data.test, k, window=window)
    scores = baseline.scores(data.test).toarray()
    popularity = np.bincount(np.concatenate(list(training_sequences(data).values())), minlength=30)
    for i, (user, position) in enumerate(zip(data.test.user, data.test.position, strict=True)):
        seen = set(data.history(user, position, window).items.tolist())
        order = sorted(range(30), key=lambda v: (-scores[i, v], -popularity[v], v))
        expected = [v for v in order if v not in seen][:k]
        assert lists[i].tolist() == expected + [-1] * (k - len(expected))


def test_an_item_stands_in_the_list_where_its_rank_says():
    data = random_dataset(6)
    baseline, target = ItemKNN(data), data.target(data.test)
    ranks, lists = baseline.ranks(data.test), baseline.top_items(data.test, 30)
    values, offsets = data.exclude(data.test)
    new = [target[i] not in values[offsets[i] : offsets[i + 1]] for i in range(len(target))]
    assert 0 < sum(new) < len(new)
    for i in np.flatnonzero(new):
        assert lists[i, ranks[i] - 1] == target[i]


def test_lists_of_no_examples_and_no_items():
    data = random_dataset(3)
    assert Popularity(data).top_items(examples([]), 4).shape == (0, 4)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        Popularity(data).top_items(data.test, 0)

"""The generated catalog: size, determinism, and that titles tell the next item."""

from __future__ import annotations

import numpy as np
import pytest

from r2ec_fast.data import generate_interactions, make_splits
from r2ec_fast.data.sources.synthetic import KITS


@pytest.fixture(scope="module")
def data():
    return generate_interactions()


def test_size_and_shape(data):
    assert data.num_items >= 2_000 and data.num_users >= 1_000
    assert len(set(data.catalog.titles)) == data.num_items
    for u in range(data.num_users):
        times = data.timestamp[data.offsets[u] : data.offsets[u + 1]]
        assert len(times) >= 4 and (np.diff(times) > 0).all()
    assert set(np.unique(data.rating)) <= {2.0, 3.0, 4.0, 5.0}
    assert "generated data" in data.report.to_text()


def test_the_seed_decides_everything(data):
    again, other = generate_interactions(), generate_interactions(seed=1)
    for name in ("item", "timestamp", "rating", "offsets"):
        np.testing.assert_array_equal(getattr(data, name), getattr(again, name))
    assert data.catalog.fields.equals(again.catalog.fields)
    assert not np.array_equal(data.item, other.item)


def ndcg(dataset, score) -> float:
    """ndcg@10 over the test examples of score(history) -> [N], history excluded."""
    values, offsets = (x.numpy() for x in dataset.exclude(dataset.test))
    total = 0.0
    for i, target in enumerate(dataset.target(dataset.test)):
        scores = score(dataset.history(int(dataset.test.user[i]), int(dataset.test.position[i])))
        best = scores[target]
        scores[values[offsets[i] : offsets[i + 1]]] = -np.inf
        rank = 1 + int((scores > best).sum())
        total += 1 / np.log2(rank + 1) if rank <= 10 else 0.0
    return total / len(dataset.test)


def test_titles_tell_the_next_item_and_popularity_does_not(data):
    """A rule read off the titles alone, no counts of items, is far above popularity."""
    dataset = make_splits(data)
    popularity = np.bincount(dataset.target(dataset.train), minlength=data.num_items).astype(float)
    words = [title.split() for title in data.catalog.titles]
    follows = {
        name: names[(i + 1) % len(names)] for names in KITS.values() for i, name in enumerate(names)
    }
    product = [" ".join(w[3:]) for w in words]
    brand = np.array([w[0] for w in words])
    color = np.array([w[1] for w in words])
    names = np.array(product)

    def by_title(history):
        last = history.items[-8:]
        score = 4.0 * (names == follows[product[last[-1]]])
        for item in last:
            score += 0.2 * (brand == brand[item]) + 0.2 * (color == color[item])
        return score

    assert ndcg(dataset, by_title) > 0.35
    assert ndcg(dataset, lambda _history: popularity.copy()) < 0.02


@pytest.mark.parametrize(
    "wrong, message",
    [({"num_users": 0}, "num_users"), ({"mean_events": 3}, "mean_events"), ({"noise": 2}, "noise")],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        generate_interactions(**wrong)

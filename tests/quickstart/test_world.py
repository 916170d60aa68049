"""The generated world: its rule, its data set, and the best that any ranking can score."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from r2ec_fast.eval.baselines import counting_baselines
from r2ec_fast.eval.metrics import ranking_metrics
from r2ec_fast.quickstart.world import DAY, Link, World

SMALL = World(products=12, colours=3, users=60, events=7, noise=0.2, seed=5)


def test_a_colour_is_a_one_to_one_relation_without_loops():
    relations = SMALL.leads_to
    assert relations.shape == (3, 12)
    for relation in relations:
        assert sorted(relation) == list(range(12))
        assert (relation != np.arange(12)).all()
    assert not (relations[0] == relations[1]).all()


@pytest.mark.parametrize("order", ["newest_first", "oldest_first"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_chain_walks_the_colours_of_the_last_purchases(order, steps):
    # product, colour; the first purchase is older than the chain looks back
    history = np.array([p * 3 + c for p, c in [(4, 1), (7, 0), (2, 2), (9, 1)]])
    colours = [1, 2, 0] if order == "newest_first" else [0, 2, 1]
    product, links = 9, []
    for colour in colours[:steps]:
        after = int(SMALL.leads_to[colour][product])
        links.append(Link(colour, product, after))
        product = after
    chain = SMALL.chain(history, steps=steps, order=order)
    assert chain.links == tuple(links) and chain.end == product


def by_hand(world: World, history: list[int]) -> dict[int, float]:
    """The distribution of the next purchase, written once more from the world's description."""
    free = [i for i in range(world.num_items) if i not in history]
    product = world.chain(np.array(history)).end
    right = [i for i in free if i // world.colours == product]
    shares = {i: world.noise / len(free) for i in free}
    for item in right or free:
        shares[item] += (1 - world.noise) / len(right or free)
    return shares


def test_probabilities_of_the_next_item():
    dataset = SMALL.dataset()
    items = dataset.data.item.reshape(60, 7)
    for length in (3, 4, 6):
        shares = SMALL.next_item_probabilities(items[:, :length])
        for row, history in zip(shares, items[:, :length].tolist(), strict=True):
            hand = by_hand(SMALL, history)
            np.testing.assert_allclose(row, [hand.get(i, 0.0) for i in range(36)], atol=1e-12)
    # before the chain begins, anything but what was bought
    first = SMALL.next_item_probabilities(np.array([[8]]))[0]
    assert first[8] == 0 and np.allclose(np.delete(first, 8), 1 / 35)


def test_all_colours_bought_leaves_anything():
    world = World(products=4, colours=2, steps=1, events=8, noise=0.0)
    last = 0
    end = world.leads_to[0, 0]
    shares = world.next_item_probabilities(np.array([[end * 2, end * 2 + 1, last]]))[0]
    assert shares[[end * 2, end * 2 + 1, last]].sum() == 0
    assert sorted(shares[shares > 0]) == pytest.approx([1 / 5] * 5)


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_purchases_follow_the_chain_except_for_the_noise(noise):
    world = World(users=400, noise=noise, seed=3)
    dataset = world.dataset()
    items = dataset.data.item.reshape(400, 9)
    assert all(len(set(row)) == 9 for row in items.tolist())
    follows = [
        world.chain(row[:i]).end == row[i] // world.colours for row in items for i in range(3, 9)
    ]
    by_chance = noise / world.products  # about: what was bought is not bought again
    assert np.mean(follows) == pytest.approx(1 - noise + by_chance, abs=0.03 if noise else 0.005)
    colours = np.bincount(items.ravel() % 4, minlength=4) / items.size
    assert colours == pytest.approx([0.25] * 4, abs=0.03)


def test_the_data_set_is_split_by_time_and_knows_three_purchases():
    dataset = SMALL.dataset()
    data = dataset.data
    assert data.num_users == 60 and data.num_events == 420 and data.num_items == 36
    assert len(set(data.catalog.titles)) == 36
    parts = (dataset.train, dataset.valid, dataset.test)
    assert min(part.position.min() for part in parts) == 3
    assert sum(map(len, parts)) == 60 * 4
    times = [dataset.target_time(part) for part in parts]
    assert times[0].max() <= times[1].min() and times[1].max() <= times[2].min()
    gaps = np.diff(data.timestamp.reshape(60, 7), axis=1)
    assert (gaps % DAY == 0).all() and set(np.unique(gaps // DAY)) == {1, 2, 3}
    assert "generated data" in data.report.source


def test_the_seed_decides_everything():
    same, other = World(users=20), World(users=20, seed=1)
    one, two = World(users=20).dataset().data, same.dataset().data
    assert (one.item == two.item).all() and (one.timestamp == two.timestamp).all()
    assert not (same.leads_to == other.leads_to).all()
    assert not (one.item == other.dataset().data.item).all()


# ---- the best possible --------------------------------------------------------------------------


def test_best_possible_is_that_of_the_best_of_all_rankings():
    """Every order of the items that are left, for every history, by expectation."""
    world = World(products=3, colours=2, steps=2, users=12, events=5, noise=0.3, seed=1)
    dataset = world.dataset()
    expected = {"ndcg@2": 0.0, "hit_rate@2": 0.0, "mrr@2": 0.0}
    for user, position in zip(dataset.train.user, dataset.train.position, strict=True):
        history = dataset.history(int(user), int(position)).items.tolist()
        shares = by_hand(world, history)
        for name, gain in (
            ("ndcg@2", lambda rank: 1 / np.log2(rank + 1)),
            ("hit_rate@2", lambda rank: 1.0),
            ("mrr@2", lambda rank: 1 / rank),
        ):
            expected[name] += max(
                sum(shares[item] * gain(rank) for rank, item in enumerate(order[:2], start=1))
                for order in permutations(shares)
            ) / len(dataset.train)
    found = world.best_possible(dataset, dataset.train, ks=(2,))
    assert found.pop("examples") == len(dataset.train)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_best_possible_is_what_the_rule_scores_on_the_purchases(noise):
    """Monte-Carlo: the generated purchases themselves, ranked by the rule."""
    world = World(users=3000, noise=noise, seed=2)
    dataset = world.dataset()
    examples = dataset.test
    ranks = []
    for user, position in zip(examples.user, examples.position, strict=True):
        history = dataset.history(int(user), int(position)).items
        shares = by_hand(world, history.tolist())
        order = sorted(shares, key=lambda item: (-shares[item], item))
        target = int(dataset.data.item[dataset.data.offsets[user] + position])
        ranks.append(order.index(target) + 1)
    measured = ranking_metrics(ranks, users=examples.user)
    best = world.best_possible(dataset, examples)
    for name in ("ndcg@5", "hit_rate@10", "ndcg@10", "mrr@20"):
        assert best[name] == pytest.approx(measured[name], abs=3 * measured[f"{name}/se"] + 1e-9)


def test_best_possible_by_hand():
    """Four free colours without noise: one of the first four ranks, each alike."""
    world = World(users=30, events=4)
    dataset = world.dataset()
    items = dataset.data.item.reshape(30, 4)
    none_bought = [world.chain(row[:3]).end not in row[:3] // 4 for row in items]
    chosen = np.isin(dataset.train.user, np.flatnonzero(none_bought))
    best = world.best_possible(dataset, dataset.train[chosen])
    assert best["ndcg@10"] == pytest.approx((1 + 0.63093 + 0.5 + 0.43068) / 4, abs=1e-5)
    assert best["hit_rate@5"] == pytest.approx(1)


def test_counting_knows_little():
    world = World(users=600)
    dataset = world.dataset()
    best = world.best_possible(dataset, dataset.test)["ndcg@10"]
    for baseline in counting_baselines(dataset):
        counted = ranking_metrics(baseline.ranks(dataset.test))["ndcg@10"]
        assert 4 * counted < best, baseline.name


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"products": 1}, r"products: expected 2\.\.60, got 1"),
        ({"products": 61}, r"products: expected 2\.\.60, got 61"),
        ({"colours": 0}, r"colours: expected 1\.\.8, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"users": 0}, "users: expected at least 1, got 0"),
        ({"events": 3}, r"events: expected 4\.\.192, got 3"),
        ({"products": 2, "colours": 2, "events": 5}, r"events: expected 4\.\.4, got 5"),
        ({"noise": 1.5}, r"noise: expected a probability in 0\.\.1, got 1.5"),
        ({"noise": float("nan")}, r"noise: expected a probability in 0\.\.1, got nan"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        World(**wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 4}, r"steps: expected 0\.\.3, got 4"),
        ({"order": "random"}, r"order: expected one of \('newest_first', .*, got 'random'"),
        ({"history": np.array([1, 2])}, "history: expected at least 3 items, got 2"),
    ],
)
def test_chains_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        SMALL.chain(**({"history": np.array([1, 2, 3])} | wrong))

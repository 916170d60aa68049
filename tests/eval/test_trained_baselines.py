"""ALS, BPR, SASRec and its kin: equal to their libraries' own lists, leak-free, repeatable."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from _support.histories import dataset, random_dataset, training_sequences

from r2ec_fast.data import Catalog, Examples, RecDataset
from r2ec_fast.eval import trained_baselines
from r2ec_fast.eval.baseline_choice import (
    LIBRARY,
    checked_settings,
    chosen_baselines,
    fits_table,
    fitted_baselines,
)
from r2ec_fast.eval.baselines import COUNTING
from r2ec_fast.eval.trained_baselines import ALS, VectorBaseline

SHORT = {  # of training, so that a test takes a second
    "als": {"factors": 6, "iterations": 3},
    "bpr": {"factors": 6, "iterations": 20},
    **{
        name: {"n_factors": 8, "session_max_len": 6, "epochs": 2, "n_negatives": 5}
        for name in ("sasrec", "esasrec", "sasrec-text")
    },
}


def fit(name: str, data: RecDataset, **settings) -> VectorBaseline:
    for module in LIBRARY[name][0].libraries:
        pytest.importorskip(module, reason="needs the extra `baselines`")
    checked = checked_settings([name], {name: SHORT[name] | settings})
    [baseline] = fitted_baselines(data, [name], checked)
    return baseline


def toy(seed: int = 2) -> RecDataset:
    """Histories in which items 28 and 29 have no training event, titled "item N of M"."""
    data = random_dataset(seed)
    items = data.data.item.copy()
    items[items >= 28] = 27
    last = data.data.offsets[data.test.user] + data.test.position
    items[last[:6]] = [28, 29, 28, 29, 28, 29]
    titles = [f"item {i} of {i % 4}" for i in range(30)]
    titles[29] = "nothing like it"
    fields = data.data.catalog.fields.with_columns(title=np.array(titles))
    catalog = Catalog(data.data.catalog.ids, fields)
    changed = dataclasses.replace(data.data, item=items, catalog=catalog)
    return dataclasses.replace(data, data=changed)


@pytest.mark.peers
@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("window", [None, 2])
def test_ranks_and_lists_are_those_of_a_stable_sort(name, window):
    data = toy()
    baseline = fit(name, data)
    ranks = baseline.ranks(data.test, window=window)
    lists = baseline.top_items(data.test, 9, window=window)
    products = baseline.queries(data.test).astype(np.float64) @ baseline.table.numpy().T
    scores = np.full((len(data.test), 30), -np.inf)
    scores[:, baseline.items] = products.astype(np.float32)
    popularity = np.bincount(np.concatenate(list(training_sequences(data).values())), minlength=30)
    cold = 0
    for i, (user, position) in enumerate(zip(data.test.user, data.test.position, strict=True)):
        target = data.target(data.test)[i]
        seen = set(data.history(user, position, window).items.tolist())
        order = sorted(range(30), key=lambda v: (-scores[i, v], -popularity[v], v))
        allowed = [v for v in order if v not in seen or v == target]
        assert ranks[i] == 1 + allowed.index(target)
        named = [v for v in order if v not in seen and scores[i, v] > -np.inf]
        assert lists[i].tolist() == named[:9]
        cold += popularity[target] == 0
    assert cold >= 6


@pytest.mark.peers
@pytest.mark.parametrize("name", ["als", "bpr"])
def test_implicit_recommends_the_same(name):
    data = toy()
    baseline = fit(name, data)
    # with whole training histories, where both see the same: the example after the last of them
    users = np.unique(data.train.user)
    last = np.array([data.train.position[data.train.user == user].max() for user in users])
    after = Examples(users, last + 1)
    from r2ec_fast.eval.trained_baselines import each_pair_once

    values, offsets = (np.asarray(part) for part in data.exclude(after))
    rows = np.repeat(np.arange(len(users)), np.diff(offsets))
    matrix = each_pair_once(rows, values, (len(users), 30))
    ids, _ = baseline.model.recommend(users, matrix, N=5, recalculate_user=name == "als")
    np.testing.assert_array_equal(baseline.top_items(after, 5), ids)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["sasrec", "esasrec", "sasrec-text"])
def test_rectools_recommends_the_same(name):
    data = toy()
    baseline = fit(name, data)
    from rectools import Columns

    from r2ec_fast.eval.sequence_baselines import rectools_dataset

    values, offsets = (np.asarray(part) for part in data.exclude(data.test))
    users = np.repeat(np.arange(len(data.test)), np.diff(offsets))
    positions = np.arange(len(users)) - offsets[users]
    known = rectools_dataset(users, values, positions)
    ids = np.unique(users)
    reco = baseline.model.recommend(ids, known, k=4, filter_viewed=True)
    trained = np.unique(np.concatenate(list(training_sequences(data).values())))
    for row, own in reco.groupby(Columns.User):
        ours = [v for v in baseline.top_items(data.test[[row]], 30)[0] if v in trained]
        assert own.sort_values(Columns.Rank)[Columns.Item].tolist() == ours[:4]


@pytest.mark.peers
@pytest.mark.parametrize("name", LIBRARY)
def test_the_same_seed_gives_the_same_numbers_and_leaves_the_generator_alone(name):
    data = toy()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = fit(name, data, seed=3)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    two, other = fit(name, data, seed=3), fit(name, data, seed=4)
    np.testing.assert_array_equal(one.table.numpy(), two.table.numpy())
    np.testing.assert_array_equal(one.queries(data.test), two.queries(data.test))
    assert not np.array_equal(one.table.numpy(), other.table.numpy())


@pytest.mark.peers
@pytest.mark.parametrize("name", LIBRARY)
def test_nothing_after_the_training_events_is_learnt_and_nothing_later_is_seen(name):
    histories = [[0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [2, 0, 1, 3, 5], [3, 2, 1, 0, 4]]
    train = [(u, p) for u in range(4) for p in (1, 2)]
    before = dataset(histories, 7, train, [(u, 3) for u in range(4)])
    # the targets, and what follows them, become other items
    after = dataset([h[:3] + [6, 5] for h in histories], 7, train, [(u, 3) for u in range(4)])
    one, two = fit(name, before), fit(name, after)
    np.testing.assert_array_equal(one.items, two.items)
    np.testing.assert_array_equal(one.table.numpy(), two.table.numpy())
    np.testing.assert_array_equal(one.queries(before.test), two.queries(after.test))


@pytest.mark.peers
@pytest.mark.parametrize("name", ["als", "sasrec", "esasrec", "sasrec-text"])
def test_the_history_up_to_the_example_is_seen(name):
    histories = [[0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [2, 0, 1, 3, 4], [3, 2, 1, 0, 4]]
    train, test = [(u, p) for u in range(4) for p in (1, 2)], [(u, 4) for u in range(4)]
    before = dataset(histories, 7, train, test)
    after = dataset([[*h[:3], 0 if h[3] else 3, h[4]] for h in histories], 7, train, test)
    one, two = fit(name, before), fit(name, after)
    np.testing.assert_array_equal(one.table.numpy(), two.table.numpy())
    different = (one.queries(before.test) != two.queries(after.test)).any(1)
    assert different.all()


@pytest.mark.peers
def test_words_give_an_item_a_vector_that_training_never_saw():
    data = toy()
    text, plain = fit("sasrec-text", data), fit("sasrec", data)
    assert 28 in text.items and 29 not in text.items  # 29 shares no word with the others
    assert 28 not in plain.items
    of = {v: text.table[text.row[v]].numpy() for v in (0, 4, 28)}
    [net] = text.model.torch_model.item_model.item_net_blocks
    features = text.model.data_preparator.train_dataset.item_features.get_cat_features()
    weight = {w: net.embedding_bag.weight[i].detach().numpy() for i, (_, w) in
              enumerate(features.names)}  # fmt: skip
    np.testing.assert_allclose(of[28], weight["item"] + weight["of"] + weight["0"], atol=1e-6)
    np.testing.assert_allclose(of[4], weight["item"] + weight["of"] + weight["0"] + weight["4"],
                               atol=1e-6)  # fmt: skip


@pytest.mark.peers
@pytest.mark.parametrize("name", ["als", "sasrec"])
def test_a_user_of_whom_nothing_is_known_gets_the_popular_items(name):
    histories, train = [[3, 1, 2], [3, 1, 0], [3, 3], [4, 5]], [(0, 1), (1, 1), (2, 1)]
    baseline = fit(name, data := dataset(histories, 6, train, [(3, 1)]))
    assert baseline.top_items(data.test, 2).tolist() == [[3, 1]]  # by popularity, not by id
    assert baseline.ranks(data.test).tolist() == [5]  # after 3 and 1; cold, after 0 and 2 by id


@pytest.mark.peers
def test_a_data_set_without_training_examples_is_refused():
    data = dataset([[0, 1]], 2, [], [(0, 1)])
    with pytest.raises(ValueError, match="train: als needs training examples, the data set has"):
        fit("als", data)


def test_names_and_groups():
    assert chosen_baselines(True) == chosen_baselines("counting") == list(COUNTING)
    assert chosen_baselines(False) == chosen_baselines("none") == []
    assert chosen_baselines("all") == [*COUNTING, *LIBRARY]
    assert chosen_baselines("als, popularity,als") == ["als", "popularity"]
    assert chosen_baselines(["bpr"]) == ["bpr"]
    with pytest.raises(ValueError, match="baselines: expected counting, all, none, or any of pop"):
        chosen_baselines("sasrek")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"bprr": {}}, ValueError, "settings of any of als, bpr, .* got 'bprr'"),
        ({"item-knn": {}}, ValueError, "settings of any of als, bpr, .* got 'item-knn'"),
        ({"als": {"factor": 3}}, ValueError, "any of factors, .* for als, got 'factor'"),
        ({"als": {"factors": 3.5}}, TypeError, r"als.factors: expected a value like 64, got 3.5"),
        ({"als": {"seed": True}}, TypeError, "als.seed: expected a value like 42, got True"),
    ],
)
def test_mistakes_in_settings_are_named(given, error, message):
    with pytest.raises(error, match=message):
        checked_settings(["als", "item-knn"], given)


def test_a_missing_library_is_named_with_what_to_install(monkeypatch):
    present = ["rectools"]
    monkeypatch.setattr(
        trained_baselines.importlib.util, "find_spec", lambda name: name in present or None
    )
    with pytest.raises(ImportError, match=r"sasrec needs pytorch_lightning: pip install 'r2ec-f"):
        checked_settings(["popularity", "sasrec"], {})
    with pytest.raises(ImportError, match=r"als needs implicit: pip install 'r2ec-fast\[baseli"):
        ALS(random_dataset(1))
    assert checked_settings(["popularity"], {"als": {"factors": 3}}) == {}


def test_the_table_of_fits():
    fits = {
        "popularity": {"fit_seconds": 0.01, "fit_cpu_seconds": 0.02, "settings": {}},
        "als": {
            "fit_seconds": 1.26,
            "fit_cpu_seconds": 3.0,
            "settings": {"factors": 8, "seed": 1},
        },
    }
    assert fits_table(fits).splitlines()[2:] == [
        "| popularity | 0.0 | 0.0 | – |",
        "| als | 1.3 | 3.0 | factors 8, seed 1 |",
    ]

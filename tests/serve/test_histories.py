"""Histories that are none: a message that names what came. Scalars of numpy are taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _support.toy import toy_dataset, toy_model

from r2ec_fast.data import History, UnknownIdError
from r2ec_fast.serve.recommender import Recommender

DATA = toy_dataset()
CATALOG = DATA.data.catalog


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return Recommender(toy_model(dtype=torch.float32).eval(), CATALOG, data=DATA)


@pytest.mark.parametrize("item", [-1, 99, 16])
def test_internal_ids_outside_the_catalog(recommender, item):
    with pytest.raises(ValueError, match=rf"item {item} is outside 0\.\.15"):
        recommender.recommend([History(np.array([0, item]))], k=2, reasoning=False)


@pytest.mark.parametrize(
    "history", [[-1], [99], [None], [["i1"], "i2"], [b"i1"], [np.int64(-1)], [1.5]], ids=repr
)
def test_lists_with_what_is_no_item(recommender, history):
    with pytest.raises(UnknownIdError, match="unknown item .*: neither an item id nor a title"):
        recommender.recommend([history], k=2, reasoning=False)


@pytest.mark.parametrize("user", [-1, None, 3.5, frozenset({"i1"}), b"u1", np.int64(1)], ids=repr)
def test_what_is_no_user(recommender, user):
    with pytest.raises(UnknownIdError, match="unknown id .*not one of the 12 known ids"):
        recommender.recommend([user], k=2, reasoning=False)


@pytest.mark.parametrize("histories", [{"u1"}, "u1", b"u1", None, 7, {"u1": 1}], ids=repr)
def test_what_is_no_list_of_histories(recommender, histories):
    with pytest.raises(TypeError, match="histories: expected a list of user ids or of item lists"):
        recommender.recommend(histories, k=2, reasoning=False)


def test_text_of_numpy_is_text(recommender):
    for history in (["i1", np.str_("i2")], (np.str_("i1"), "i2"), list(np.array(["i1", "i2"]))):
        (result,) = recommender.recommend([history], k=2, reasoning=False)
        assert result.history == tuple(CATALOG.titles[i] for i in CATALOG.ids.encode(["i1", "i2"]))
    assert recommender.recommend([np.str_("u1")], k=2, reasoning=False)


@pytest.mark.parametrize("items", [np.array([0.0, 1.0]), np.array(["i1"]), np.array([True])])
def test_internal_ids_of_another_type(recommender, items):
    with pytest.raises(TypeError, match=f"History.items: expected int64 .n., got {items.dtype}"):
        recommender.recommend([History(items)], k=2, reasoning=False)


@pytest.mark.parametrize("setting", [{"k": "2"}, {"k": 2.0}, {"k": True}, {"batch_size": None}])
def test_settings_that_are_no_integers(recommender, setting):
    [name] = setting
    with pytest.raises(TypeError, match=f"{name}: expected an int, got"):
        recommender.recommend([["i1"]], reasoning=False, **setting)

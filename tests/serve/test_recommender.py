"""Serving: the order against a dense product, what is excluded, how histories are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _support.toy import toy_dataset, toy_model

from r2ec_fast.data import Catalog, History, UnknownIdError
from r2ec_fast.serve.recommender import Recommender

DATA = toy_dataset()
CATALOG = DATA.data.catalog


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    return Recommender(toy_model(dtype=torch.float32).eval(), CATALOG, data=DATA)


def expected(recommender: Recommender, prompt_ids: list[int], seen: list[int]) -> list[int]:
    model = recommender.model
    state = model.encode_rows([prompt_ids])
    table = model.encode_items(CATALOG)
    cosine = torch.nn.functional.cosine_similarity(state, table) / model.temperature
    order = torch.sort(cosine.float(), descending=True, stable=True).indices.tolist()
    return [item for item in order if item not in seen]


def whole_history(user: int) -> History:
    stored = DATA.history(user, 5)
    return History(
        stored.items, stored.timestamps, stored.ratings, target_time=int(stored.timestamps[-1])
    )


def test_direct_mode_is_the_order_of_the_dense_product(recommender):
    results = recommender.recommend([f"u{u}" for u in range(12)], k=6, reasoning=False)
    assert len(results) == 12
    for user, result in enumerate(results):
        history = whole_history(user)
        ids = [*recommender.builder.user_ids(history), *recommender.builder.marker_ids]
        items = expected(recommender, ids, history.items.tolist())[:6]
        assert [r.item_id for r in result] == [f"i{i}" for i in items]
        assert [r.title for r in result] == [CATALOG.titles[i] for i in items]
        assert [r.rank for r in result] == [1, 2, 3, 4, 5, 6]
        assert result.reasoning is None
        assert result.history == tuple(CATALOG.titles[i] for i in history.items[-3:])
        scores = [r.score for r in result]
        assert scores == sorted(scores, reverse=True) and max(np.abs(scores)) <= 10.001


def test_reasoned_mode_reads_the_state_after_the_reasoning(recommender):
    (result,) = recommender.recommend(["u3"], k=4, max_completion_length=5)
    history = whole_history(3)
    prompt = recommender.builder.user_ids(history)
    rollout = recommender.engine.generate(
        [prompt], user_keys=[0], num_generations=1, max_completion_length=5, greedy=True
    )
    items = expected(recommender, [*prompt, *rollout.values.tolist()], history.items.tolist())
    assert [r.item_id for r in result] == [f"i{i}" for i in items[:4]]
    text = recommender.model.tokenizer.decode(rollout.values, skip_special_tokens=True)
    assert text.endswith("<answer>")
    assert result.reasoning == text.removesuffix("<answer>").strip()
    direct = recommender.recommend(["u3"], k=4, reasoning=False)[0]
    assert [r.score for r in direct] != [r.score for r in result]


def test_ids_titles_and_histories_name_the_same_items(recommender):
    by_id, by_title, by_history = recommender.recommend(
        [["i3", "i9"], ["RED lamp", "i9"], History(np.array([3, 9]))], reasoning=False
    )
    assert by_id == by_title == by_history
    assert not {"i3", "i9"} & {r.item_id for r in by_id}


def test_all_of_a_users_history_is_excluded_and_the_rest_returned(recommender):
    (result,) = recommender.recommend(["u0"], k=100, reasoning=False)
    seen = {f"i{i}" for i in whole_history(0).items}
    assert len(result) == 16 - len(seen) and len(seen) > recommender.model.prompts.window
    assert {r.item_id for r in result} == set(CATALOG.ids) - seen


def test_batches_change_nothing(recommender):
    users = [f"u{u}" for u in range(7)]
    one = recommender.recommend(users, k=5, batch_size=1, max_completion_length=4)
    many = recommender.recommend(users, k=5, batch_size=3, max_completion_length=4)
    assert [[r.item_id for r in x] for x in one] == [[r.item_id for r in x] for x in many]
    assert [x.reasoning for x in one] == [x.reasoning for x in many]
    assert recommender.recommend([]) == []


def test_now_sets_the_ages_of_the_prompt(recommender):
    prompts = []
    for now in (None, 5 * 86_400):
        history = recommender._history("u1", now)
        prompts.append(recommender.builder.user_text(history).split("\n")[-1])
    assert prompts[0].startswith("0.0min ago: [")
    assert prompts[1].startswith("1d 0.0h ago: [")


def test_saved_and_loaded_recommends_the_same(recommender, tmp_path):
    recommender.model.save_pretrained(tmp_path / "model", CATALOG)
    DATA.save(tmp_path / "data")
    loaded = Recommender.from_pretrained(tmp_path / "model", data=tmp_path / "data")
    ours = recommender.recommend(["u2", ["blue mug"]], k=5, reasoning=False)
    theirs = loaded.recommend(["u2", ["blue mug"]], k=5, reasoning=False)
    assert [[r.item_id for r in x] for x in ours] == [[r.item_id for r in x] for x in theirs]


@pytest.mark.parametrize(
    ("histories", "options", "kind", "message"),
    [
        (["u0"], {"k": -1}, ValueError, "k: expected at least 1, got -1"),
        (["u0"], {"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        (["u99"], {}, UnknownIdError, "unknown id 'u99'"),
        ([["i0", "chair"]], {}, UnknownIdError, "unknown item 'chair': neither an item id nor"),
        ([[]], {}, ValueError, "every history needs at least one item"),
        ("u0", {}, TypeError, "expected a list of user ids or of item lists, got 'u0'"),
    ],
)
def test_bad_requests_are_named(recommender, histories, options, kind, message):
    with pytest.raises(kind, match=message):
        recommender.recommend(histories, reasoning=False, **options)


def test_a_user_id_needs_a_data_set_and_titles_must_be_unique():
    fields = CATALOG.fields.with_columns(title=CATALOG.fields["title"].str.replace("mug", "lamp"))
    alone = Recommender(toy_model(dtype=torch.float32).eval(), Catalog(CATALOG.ids, fields))
    with pytest.raises(ValueError, match="got the user id 'u0', but no data set"):
        alone.recommend(["u0"])
    with pytest.raises(ValueError, match=r"belongs to several items: \['i1', 'i3'\]"):
        alone.recommend([["red lamp"]])


def test_a_table_of_another_catalog_is_refused():
    model = toy_model(dtype=torch.float32).eval()
    model.set_items(model.encode_items(CATALOG)[:7])
    with pytest.raises(ValueError, match="expected the 7 items of the model's item table, got 16"):
        Recommender(model, CATALOG)


def test_a_directory_without_a_catalog_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model directory"):
        Recommender.from_pretrained(tmp_path / "nothing")
    toy_model(dtype=torch.float32).save_pretrained(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="holds no catalog.parquet"):
        Recommender.from_pretrained(tmp_path / "bare")


def test_only_allowed_items_are_recommended(recommender):
    whole = recommender.recommend(["u1"], k=16, reasoning=False)[0]
    lamps = [r for r in whole if "lamp" in r.title.lower()]
    assert 0 < len(lamps) < len(whole)
    filtered = recommender.recommend(
        ["u1"], k=16, reasoning=False, filter={"title": {"contains": "lamp"}}
    )[0]
    assert [(r.item_id, r.score) for r in filtered] == [(r.item_id, r.score) for r in lamps]
    assert [r.rank for r in filtered] == list(range(1, len(lamps) + 1))
    chosen = [lamps[-1].item_id, whole[0].title, "i0"]
    some = recommender.recommend(["u1"], k=16, reasoning=False, include=chosen)[0]
    wanted = {lamps[-1].item_id, whole[0].item_id, "i0"}
    assert [r.item_id for r in some] == [r.item_id for r in whole if r.item_id in wanted]
    both = recommender.recommend(
        ["u1"], k=16, reasoning=False, include=chosen, filter={"title": {"contains": "lamp"}}
    )[0]
    assert {r.item_id for r in both} == wanted & {r.item_id for r in lamps}
    assert len(recommender.recommend(["u1"], k=3, reasoning=False, include=[])[0]) == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"include": "i1"}, TypeError, "include: expected a list"),
        ({"include": ["i1", "nowhere"]}, UnknownIdError, "nowhere"),
        ({"filter": {"colour": "red"}}, ValueError, "filter: the items have no column 'colour'"),
    ],
)
def test_an_allow_list_that_fits_nothing_is_refused(recommender, settings, error, message):
    with pytest.raises(error, match=message):
        recommender.recommend(["u1"], k=3, reasoning=False, **settings)

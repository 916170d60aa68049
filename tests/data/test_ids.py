"""One id has one spelling, whatever it is written as and whichever way its line is read."""

from __future__ import annotations

import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_fast.data import IdMap, UnknownIdError, load_interactions

BROKEN = '{"user_id": "half\n'


def users_of(write, *ids: str) -> tuple:
    """The users of a JSON Lines file, which is the same beside a broken line."""
    lines = "".join(f'{{"user_id": {text}, "item_id": 1}}\n' for text in ids)
    fast = load_interactions(write("fast.jsonl", lines), min_user_events=1).users.ids
    slow = load_interactions(write("slow.jsonl", lines + BROKEN), min_user_events=1).users.ids
    assert fast == slow
    return fast


@pytest.mark.parametrize(
    "ids, expected",
    [
        (("1e16", "10000000000000000", "10000000000000000.0", '"10000000000000000"'), 1),
        (("42", "42.0", '"42"', '"42.0"', "4.2e1", '" 42 "'), 1),
        (("1e16", "2e16", "12345678901234567.0"), 3),
        (("1e21", "1e300", "1.5e-10"), 3),
        (("0", "-0.0", '"0"', "0.0"), 1),
        (("0.1", '"0.1"'), 1),
        (("true", '"true"', "false"), 2),
        (("123456789012345678901234567890", '"123456789012345678901234567890"'), 1),
        (('"042"', "42"), 2),
        (("18446744073709551615", "-9223372036854775809", "9007199254740993"), 3),
        (('"\\u00e9"', '"é"'), 1),
    ],
)
def test_json_numbers_have_one_spelling(write, ids, expected):
    assert len(users_of(write, *ids)) == expected


def test_the_spelling_is_decimal_digits(write):
    spelled = users_of(write, "1e16", "2.50", "1E-7", "1e5")
    assert set(spelled) == {"10000000000000000", "2.5", "0.0000001", "100000"}


def test_parquet_and_json_spell_alike(write, tmp_path):
    numbers = [1e16, 1e21, 42.0, 2.5, -0.0, 1e-7, 123456789012.5]
    pl.DataFrame({"user_id": numbers, "item_id": [1] * 7}).write_parquet(tmp_path / "x.parquet")
    table = load_interactions(tmp_path / "x.parquet", min_user_events=1)
    assert table.users.ids == users_of(write, *map(repr, numbers))


@pytest.mark.parametrize(
    "line",
    [
        '{"user_id": "a", "item_id": 1, "user_id": "b"}',
        '{"user_id": "a", "user_id": null, "item_id": 1}',
        '{"item_id": 1, "user_id": "a", "item_id": 2, "user_id": 1e16}',
    ],
)
def test_of_repeated_keys_the_first_counts(write, line):
    for name, text in (("a.jsonl", line + "\n"), ("b.jsonl", f"{line}\n{BROKEN}")):
        data = load_interactions(write(name, text), min_user_events=1)
        assert (data.users.ids, data.catalog.ids.ids) == (("a",), ("1",))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(-(2**70), 2**70), st.floats(), st.text(min_size=1), st.booleans(), st.none()
        ),
        min_size=1,
    )
)
def test_both_ways_through_agree(tmp_path_factory, ids):
    place = tmp_path_factory.mktemp("ids")
    lines = "".join(json.dumps({"user_id": x, "item_id": 1}) + "\n" for x in ids)
    found = []
    for name, text in (("a.jsonl", lines), ("b.jsonl", lines + BROKEN)):
        (place / name).write_text(text)
        try:
            found.append(load_interactions(place / name, min_user_events=1).users.ids)
        except ValueError as error:
            found.append(str(error).split(" ", 2)[-1].split("(")[0])
    assert found[0] == found[1]


def test_words_for_missing_are_ids_and_said(write):
    log = "user_id,item_id\nnan,1\nNone,2\nNULL,N/A\n,4\nx,\n"
    data = load_interactions(write("log.csv", log), min_user_events=1)
    assert data.users.ids == ("NULL", "None", "nan")
    what = "event whose {} id is a word for missing (nan, None, NULL)"
    assert data.report.count(what.format("user")) == 3
    assert data.report.count(what.format("item")) == 1
    assert data.report.count("event without user id") == 1
    assert data.report.count("event without item id") == 1
    assert users_of(write, '"null"', "null", "NaN", '"x"') == ("null", "x")


def test_text_finds_integer_ids_by_their_digits():
    ids = IdMap([42, -7, 0, "x"])
    assert ids.encode(["42", "-7", "0", "x", 42]).tolist() == [0, 1, 2, 3, 0]
    assert "42" in ids and "042" not in ids and [1] not in ids
    for text in ("042", "42.0", " 42", "4_2", "-0", "9" * 30):
        with pytest.raises(UnknownIdError, match="unknown id"):
            ids.encode([text])
    assert IdMap([42, "42"]).encode(["42", 42]).tolist() == [1, 0]

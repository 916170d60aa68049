"""Given reasonings: records of training examples, and their file."""

import json

import numpy as np
import pytest
from _support.toy import toy_dataset
from hypothesis import given
from hypothesis import strategies as st

from r2ec_fast.data import Examples, Reasonings


@pytest.fixture(scope="module")
def data():
    return toy_dataset()  # users u0..u11 of 5 events: positions 1 and 2 train, 3 and 4 do not


def line(**changes) -> str:
    record = {"user": "u2", "position": 1, "text": "Red things."} | changes
    return json.dumps({k: v for k, v in record.items() if v != "left out"})


def problem(write, data, *rows: str) -> str:
    path = write("r.jsonl", "\n".join(rows))
    with pytest.raises(ValueError) as caught:
        Reasonings.read(path, data, "reasonings")
    prefix = f"reasonings: {path}"
    assert str(caught.value).startswith(prefix)
    return str(caught.value).removeprefix(prefix)


def test_a_file_of_records(write, data):
    rows = [line(), "", line(item="i9"), line(user="u0", position=2, text="Größe\nXL")]
    found = Reasonings.read(write("r.jsonl", "\ufeff" + "\n".join(rows)), data)
    assert found.examples.user.tolist() == [2, 2, 0]
    assert found.examples.position.tolist() == [1, 1, 2]
    assert found.texts == ("Red things.", "Red things.", "Größe\nXL")
    own = data.history(2, 2).items[1], 9, data.history(0, 3).items[2]
    assert found.items.tolist() == list(own)


texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(st.integers(0, 23), texts, st.none() | st.integers(0, 15)), min_size=1))
def test_what_is_written_is_read(tmp_path_factory, records):
    data = toy_dataset()
    examples = data.train[np.array([which for which, *_ in records])]
    items = data.target(examples)
    items = np.array([t if i is None else i for t, (*_, i) in zip(items, records, strict=True)])
    path = tmp_path_factory.mktemp("r") / "r.jsonl"
    before = Reasonings.of(data, examples, [text for _, text, _ in records], items)
    before.write(path, data)
    after = Reasonings.read(path, data)
    assert after.texts == before.texts
    for a, b in [
        (after.examples.user, examples.user),
        (after.examples.position, examples.position),
        (after.items, items),
    ]:
        assert a.tolist() == b.tolist()
    assert path.read_text().count('"item"') == (items != data.target(examples)).sum()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"user": "u99"}, "user: unknown id 'u99'"),
        ({"user": "left out"}, "user: expected text or a whole number, got nothing"),
        ({"user": None}, "user: expected text or a whole number, got null"),
        ({"item": "j1"}, "item: unknown id 'j1'"),
        ({"item": [1]}, "item: expected text or a whole number, got [1]"),
        ({"position": 0}, "position: expected 1..4, because user 'u2' has 5 events; got 0"),
        ({"position": 5}, "position: expected 1..4, because user 'u2' has 5 events; got 5"),
        ({"position": 3}, "position: 3 of user 'u2' is not in the training split"),
        ({"position": 4}, "position: 4 of user 'u2' is not in the training split"),
        ({"position": "1"}, 'position: expected a whole number, got "1"'),
        ({"position": True}, "position: expected a whole number, got true"),
        ({"position": 1.0}, "position: expected a whole number, got 1.0"),
        ({"position": 2**70}, f"position: expected a whole number, got {2**70}"),
        ({"text": " \n"}, "text: expected text, got a blank"),
        ({"text": 7}, "text: expected text, got 7"),
        ({"text": "\ud800"}, "text: no UTF-8 can write it"),
        ({"itme": "i1"}, "unknown field 'itme'; expected user, position, text, item"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(write, data, changes, expected):
    found = problem(write, data, line(), "", line(**changes), line())
    assert found.startswith(f", line 3: {expected}")


def test_a_file_of_another_kind(write, data, tmp_path):
    assert problem(write, data, line(), "{").startswith(", line 2: expected JSON in UTF-8")
    assert problem(write, data, "null") == ", line 1: expected a JSON object, got null"
    assert problem(write, data, "[1]") == ", line 1: expected a JSON object, got [1]"
    assert problem(write, data, "", "") == " holds no record"
    path = write("latin.jsonl", line(text="caf").encode().replace(b"caf", b"caf\xe9"))
    with pytest.raises(ValueError, match="latin.jsonl, line 1: expected JSON in UTF-8"):
        Reasonings.read(path, data)
    with pytest.raises(FileNotFoundError, match="reasonings: no file .*none"):
        Reasonings.read(tmp_path / "none", data, "reasonings")


def test_records_from_python(data):
    examples = data.train[np.array([0, 0, 5])]
    found = Reasonings.of(data, examples, ["a", "b", "c"])
    assert len(found) == 3 and found.items.tolist() == data.target(examples).tolist()
    with pytest.raises(ValueError, match="expected as many of each, got 3, 2 and 3"):
        Reasonings.of(data, examples, ["a", "b"])
    with pytest.raises(ValueError, match="record 1: text: expected text, got a blank"):
        Reasonings.of(data, examples, ["a", " ", "c"])
    with pytest.raises(ValueError, match=r"record 2: item: expected 0\.\.15, got 16"):
        Reasonings.of(data, examples, ["a", "b", "c"], [0, 15, 16])
    with pytest.raises(ValueError, match="record 0: position: 3 of user 'u0' is not in the train"):
        Reasonings.of(data, data.valid[:1], ["a"])
    with pytest.raises(ValueError, match=r"one of a user in 0\.\.11, got user 12"):
        Reasonings.of(data, Examples(np.array([12]), np.array([1])), ["a"])


def test_a_file_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("")
    records = Reasonings.of(data, data.train[:1], ["a"])
    with pytest.raises(OSError, match="output_file: cannot write to .*file/r"):
        records.write(tmp_path / "file" / "r", data, "output_file")

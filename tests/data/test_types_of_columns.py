"""Columns of every type, in Parquet and JSON: read, counted, or an error that names the column."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal

import numpy as np
import polars as pl
import pytest

from r2ec_fast.data import load_interactions

DAY = dt.datetime(2023, 7, 1, 12)
NOON = 1_688_212_800


@pytest.fixture
def load(tmp_path):
    """load(rating=..., items={...}) -> data of three events in a Parquet log."""

    def _load(items=None, **columns):
        log = {"user_id": ["a", "a", "b"], "item_id": ["1", "2", "1"], "timestamp": [1, 2, 3]}
        table = pl.DataFrame(log | columns, strict=False)
        table.write_parquet(tmp_path / "log.parquet")
        path = None
        if items is not None:
            path = tmp_path / "items.parquet"
            pl.DataFrame({"item_id": ["1", "2"], "title": ["One", "Two"]} | items).write_parquet(
                path
            )
        return load_interactions(tmp_path / "log.parquet", items=path, min_user_events=1)

    return _load


@pytest.mark.parametrize(
    "rating, expected",
    [
        (pl.Series([None, None, None], dtype=pl.Null), None),
        (pl.Series([True, False, None]), [1, 0, np.nan]),
        (pl.Series(["5", "3.5", "x"], dtype=pl.Categorical), [5, 3.5, np.nan]),
        (pl.Series(["5", "4", "3"], dtype=pl.Enum(["5", "4", "3"])), [5, 4, 3]),
        (pl.Series([Decimal("4.5"), None, Decimal("3.00")]), [4.5, np.nan, 3]),
        (pl.Series([b"4", b"3", b""]), [4, 3, np.nan]),
        (pl.Series([1e300, 2, float("nan")]), [np.nan, 2, np.nan]),
        (pl.Series([1e300, -1e300, float("inf")]), None),
        (pl.Series(["true", "False", "2"]), [1, 0, 2]),
        (pl.Series([1, 2, 3], dtype=pl.UInt8), [1, 2, 3]),
        (pl.Series([1, 2, 3], dtype=pl.Int128), [1, 2, 3]),
    ],
)
def test_ratings(load, rating, expected):
    data = load(rating=rating)
    if expected is None:
        assert data.rating is None
    else:
        np.testing.assert_array_equal(data.rating, np.array(expected, dtype=np.float32))


def test_a_rating_that_no_float_holds_is_counted(load):
    assert load(rating=[1e300, 4.0, 5.0]).report.count("rating out of range") == 1


REFUSED = [
    pl.Series([[1], [2], [3]]),
    pl.Series([{"k": 1}] * 3),
    pl.Series([[1.0, 2.0]] * 3, dtype=pl.Array(pl.Float64, 2)),
    pl.Series([dt.timedelta(hours=1)] * 3),
    pl.Series([dt.time(12)] * 3),
]


@pytest.mark.parametrize("column", REFUSED, ids=lambda s: str(s.dtype))
@pytest.mark.parametrize("name", ["user_id", "item_id", "timestamp", "rating"])
def test_what_no_column_can_be_is_refused_by_name(load, name, column):
    with pytest.raises(ValueError, match=f"columns: .*column '{name}' of type .*; expected "):
        load(**{name: column})


@pytest.mark.parametrize("values", [[True, False, True], [DAY] * 3, [b"\xff", b"\xfe", b"a"]])
def test_ids_that_are_no_text_are_refused(load, values):
    with pytest.raises(
        ValueError, match="column 'user_id' of type .*expected text or whole numbers"
    ):
        load(user_id=values)


@pytest.mark.parametrize(
    "ids, expected",
    [
        (pl.Series([7, 8, 7], dtype=pl.UInt64), ("7", "8")),
        (pl.Series([7, 8, 7], dtype=pl.Int128), ("7", "8")),
        (pl.Series([7.0, 8.0, 7.0]), ("7", "8")),
        (pl.Series([1e16, 1e20, 0.1]), ("0.1", "10000000000000000", "100000000000000000000")),
        (pl.Series([0.1, 2.5, 0.1], dtype=pl.Float32), ("0.1", "2.5")),
        (pl.Series(["x", "y", "x"], dtype=pl.Categorical), ("x", "y")),
        (pl.Series([b"x", "é".encode(), b"x"]), ("x", "é")),
        (pl.Series([Decimal("7.00"), Decimal("8.50"), Decimal("10.00")]), ("10", "7", "8.5")),
        (pl.Series(["x", None, "x"]), ("x",)),
        (pl.Series([2**63 + 5, 1, 1], dtype=pl.UInt64), ("1", "9223372036854775813")),
    ],
)
def test_ids(load, ids, expected):
    data = load(user_id=ids)
    assert data.users.ids == expected
    assert data.report.count("event without user id") == ids.null_count()


def test_ids_of_nothing(load):
    with pytest.raises(ValueError, match="no usable event.*event without user id: 3"):
        load(user_id=pl.Series([None] * 3, dtype=pl.Null))


@pytest.mark.parametrize(
    "times",
    [
        pl.Series([DAY] * 3),
        pl.Series([DAY] * 3, dtype=pl.Datetime("ns")),
        pl.Series([DAY] * 3).dt.replace_time_zone("UTC"),
        pl.Series([DAY] * 3).dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"),
        pl.Series([DAY] * 3).dt.replace_time_zone("UTC").dt.convert_time_zone("America/St_Johns"),
        pl.Series([NOON] * 3, dtype=pl.UInt32),
        pl.Series([NOON * 1e6] * 3),
        pl.Series([Decimal(NOON)] * 3),
        pl.Series(["2023-07-01T12:00Z"] * 3, dtype=pl.Categorical),
        pl.Series([str(NOON).encode()] * 3),
    ],
    ids=lambda s: str(s.dtype),
)
def test_times(load, times):
    assert load(timestamp=times).timestamp.tolist() == [NOON] * 3


def test_dates_and_null_times(load):
    data = load(timestamp=[dt.date(2023, 7, 1), dt.date(9999, 12, 31), None])
    assert data.timestamp.tolist() == [1_688_169_600]
    assert data.report.count("event without readable time") == 2


@pytest.mark.parametrize(
    "name, column, expected",
    [
        ("genres", pl.Series([[1, 2], [3, None]]), ["1, 2", "3"]),
        ("genres", pl.Series([["War", "Drama"], None]), ["War, Drama", None]),
        ("genres", pl.Series([[["a"], ["b", "c"]], []]), ["a, b, c", None]),
        ("genres", pl.Series([[1.5, 2.0]] * 2, dtype=pl.Array(pl.Float64, 2)), ["1.5, 2.0"] * 2),
        ("genres", pl.Series([3, 4]), ["3", "4"]),
        ("description", pl.Series([["x", "y"], ["z"]]), ["x y", "z"]),
        ("description", pl.Series([None, None], dtype=pl.Null), [None, None]),
        ("brand", pl.Series([True, False]), ["true", "false"]),
        ("price", pl.Series([1e300, None]), [1e300, None]),
        ("rating_number", pl.Series([1e300, 7.0]), [None, 7]),
        ("rating_number", pl.Series([True, False]), [1, 0]),
        ("average_rating", pl.Series(["4.5", "x"], dtype=pl.Categorical), [4.5, None]),
    ],
)
def test_columns_of_items(load, name, column, expected):
    assert load(items={name: column}).catalog.fields[name].to_list() == expected


@pytest.mark.parametrize(
    "name, column",
    [
        ("genres", pl.Series([{"a": 1}] * 2)),
        ("genres", pl.Series([[{"a": 1}]] * 2)),
        ("title", pl.Series([dt.timedelta(1)] * 2)),
        ("price", pl.Series([[1], [2]])),
        ("item_id", pl.Series([[1], [2]])),
    ],
)
def test_columns_of_items_that_are_refused(load, name, column):
    with pytest.raises(ValueError, match=f"columns: .*items.parquet has the column '{name}'"):
        load(items={name: column})


def test_json_of_every_kind(write):
    rows = [
        {"user_id": 1, "item_id": "a", "rating": {"v": 3}},
        {"user_id": 1.0, "item_id": "b", "rating": True},
        {"user_id": "1", "item_id": "c", "rating": [4]},
        {"user_id": True, "item_id": "c", "rating": 1e300},
        {"user_id": [1], "item_id": "a", "rating": 5},
        {"user_id": {"id": 1}, "item_id": "a", "rating": 5},
        {"user_id": "[x]", "item_id": "a", "rating": None},
        {"user_id": None, "item_id": "a", "rating": 5},
        {"item_id": "a", "rating": 5},
    ]
    for broken in ("", "{half"):
        text = "\n".join([*map(json.dumps, rows), broken])
        data = load_interactions(write(f"x{len(broken)}.jsonl", text), min_user_events=1)
        assert data.users.ids == ("1", "[x]", "true")
        assert data.report.count("event whose id is a JSON list or object") == 2
        assert data.report.count("event without user id") == 2
        assert data.report.count("rating unreadable") == 2
        assert data.report.count("rating out of range") == 1
        assert np.nan_to_num(data.rating, nan=-1).tolist() == [-1, 1, -1, -1, -1]


def test_lists_in_an_item_table_of_json(write):
    items = [
        {"item_id": 1, "title": "One", "genres": [1, 2.50, None], "description": ["x", ["y"]]},
        {"item_id": 2, "title": "Two", "genres": "War|Drama", "description": "[not json]"},
    ]
    for broken in ("", "{half"):
        path = write("items.jsonl", "\n".join([*map(json.dumps, items), broken]))
        data = load_interactions(write("log.csv", "user_id,item_id\na,1\na,2\n"), items=path)
        assert data.catalog.fields["genres"].to_list() == ["1, 2.5", "War, Drama"]
        assert data.catalog.fields["description"].to_list() == ["x y", "[not json]"]


def test_a_path_with_brackets_is_one_file(tmp_path):
    path = tmp_path / "log[1].parquet"
    pl.DataFrame({"user_id": ["a"], "item_id": ["i"]}).write_parquet(path)
    assert load_interactions(path, min_user_events=1).users.ids == ("a",)

"""Times as logs write them: read as what they are, or counted; never August 1970."""

from __future__ import annotations

import datetime as dt

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_fast.data import load_interactions
from r2ec_fast.data.parse import parse_time, parse_times
from r2ec_fast.data.prepare import prepare_generic


def at(text: str):
    ms = parse_times(pl.Series([text]))[0]
    return None if ms is None else dt.datetime(1970, 1, 1) + dt.timedelta(milliseconds=ms)


NOON = dt.datetime(2023, 7, 1, 12)


@pytest.mark.parametrize(
    "text",
    [
        "2023-07-01 12:00:00+00",
        "2023-07-01 17:30:00.000000+05:30",
        "2023-07-01 07:00:00-05",
        "2023-07-01T07:00:00\u221205:00",
        "20230701T120000Z",
        "20230701T1200",
        "20230701T12",
        "20230701T140000+0200",
        "20230701 120000.000",
        "2023-07-01T12Z",
        "2023-07-01t12:00z",
        "2023-07-01 12:00:00 UTC",
        "2023-07-01 12:00 GMT",
        "2023-07-01 12:00:00 Z",
        "2023-07-01 14:00:00 UTC+2",
        "2023-07-01 14:00:00 GMT+02:00",
        "2023-07-01T12:00:00+00:00[UTC]",
        "2023-07-01T12:00:00Z[Etc/UTC]",
        "2023-07-01T12:00:00.0000000000001",
        "2023-W26-6T12:00",
        "2023W266T120000Z",
        "2023-182T12:00:00",
        "2023182T120000",
        "202307011200",
        "20230701120000",
        "2023070112",
        "1688212800",
        "1688212800000",
        "1688212800000000",
        "1688212800000000000",
        "1.6882128e9",
        "1688212800.25",
    ],
)
def test_the_same_noon(text):
    assert at(text).replace(microsecond=0) == NOON


@pytest.mark.parametrize(
    "text, expected",
    [
        ("20230701", dt.datetime(2023, 7, 1)),
        ("20230701.0", dt.datetime(2023, 7, 1)),
        ("2023-07-01Z", dt.datetime(2023, 7, 1)),
        ("2023-07-01T24:00", dt.datetime(2023, 7, 2)),
        ("2023-12-31 24:00:00 UTC", dt.datetime(2024, 1, 1)),
        ("20230701T240000Z", dt.datetime(2023, 7, 2)),
        ("2016-12-31T23:59:60Z", dt.datetime(2017, 1, 1)),
        ("2023-W26", dt.datetime(2023, 6, 26)),
        ("2020-W53-7", dt.datetime(2021, 1, 3)),
        ("2024-366", dt.datetime(2024, 12, 31)),
        ("2023-07-01T12:00:00,123456789", dt.datetime(2023, 7, 1, 12, 0, 0, 123000)),
    ],
)
def test_other_notations(text, expected):
    assert at(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "2023-07-01T24:30", "2023-07-01T25:00", "2023-07-01T12:60", "2023-07-01T12:00:61",
        "2023-07-01T12:00+99:00", "2023-W54-1", "2021-W53-1", "2023-366", "2023-000", "20231301",
        "20230230", "2023-07", "July 1, 2023", "01/07/2023", "12:00", "20230701T", "nan", "1e400",
    ],
)  # fmt: skip
def test_what_is_no_time_is_null(text):
    assert at(text) is None


@pytest.mark.parametrize(
    "values, seconds",
    [
        (["20230701", "20230702", None, "soon", "0", "99999999"], [1688169600, 1688256000]),
        ([20230701, 20231301], [1688169600]),
        ([20230701.0, float("nan")], [1688169600]),
        (["20230701", "2023-07-02", "202307031200"], [1688169600, 1688256000, 1688385600]),
        ([2023070112, 1688169600], [2023070112, 1688169600]),  # seconds: one of them is no date
        ([5, 40, 20_000_000], [5, 40, 20_000_000]),
        ([19_700_101], [0]),
    ],
)
def test_columns_of_digits(values, seconds):
    found = parse_times(pl.Series(values, strict=False)).drop_nulls() // 1000
    assert found.to_list() == seconds


@pytest.mark.parametrize(
    "values",
    [
        ["20230701", "1688169600"],
        [20230701, 1688169600000],
        [202307011200, 1688169600000],
        [20230701.0, 12.5],
        ["20230701", "10"],
    ],
)
def test_dates_beside_numbers_that_are_none_are_refused(values):
    with pytest.raises(ValueError, match="timestamp: .*20230701.*ISO 8601"):
        parse_times(pl.Series(values))


def test_the_refusal_does_not_depend_on_blocks(write, monkeypatch):
    rows = [f"a,{i},20230701" for i in range(400)] + ["a,1,1688169600"]
    path = write("log.csv", "\n".join(["user_id,item_id,timestamp", *rows]))
    from r2ec_fast.data import reader

    monkeypatch.setattr(
        reader.read_blocks, "__kwdefaults__", {"truncated": "refuse", "block_bytes": 500}
    )
    with pytest.raises(ValueError, match="holds both dates of digits alone"):
        load_interactions(path)


def test_unreadable_ones_are_counted(write):
    rows = ["a,1,20230701", "a,2,20230702", "a,3,soon", "a,4,20231301", "a,5,"]
    data = load_interactions(write("log.csv", "\n".join(["user_id,item_id,date", *rows])))
    assert data.report.count("event without readable time") == 3
    assert data.timestamp.tolist() == [1688169600, 1688256000]


@pytest.mark.parametrize(
    "value", ["20230701", 20230701, "2023-07-01 00:00:00+00", "20230701T000000Z"]
)
def test_settings_take_the_same(value, write, tmp_path):
    assert parse_time(value, "start") == 1688169600
    rows = [f"a,{i},{20230628 + i - 1 if i < 3 else 20230698 + i}" for i in range(1, 7)]
    path = write("log.csv", "\n".join(["user_id,item_id,timestamp", *rows]))
    done = prepare_generic(str(path), str(tmp_path / "out"), start=value)
    assert done.dataset.data.timestamp[0] == 1688169600


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.datetimes(dt.datetime(1970, 1, 2), dt.datetime(2099, 1, 1)), min_size=1),
    st.sampled_from(
        ["%Y%m%d", "%Y%m%dT%H%M%SZ", "%Y%m%d%H%M%S", "%Y%m%d%H%M", "%G-W%V-%u", "%Y-%j", "%Y-%m-%d",
         "%Y-%m-%d %H:%M:%S+00", "%Y-%m-%dT%H:%M:%S.%f UTC", "%G%V".replace("%V", "W%V%uT%H:%M")]
    ),
)  # fmt: skip
def test_a_column_in_one_notation_is_read_as_python_reads_it(moments, form):
    written = [moment.strftime(form) for moment in moments]
    resolution = 1000 if "%f" in form else 1_000_000
    expected = []
    for moment in moments:
        parts = {"hour": 0, "minute": 0, "second": 0, "microsecond": 0}
        keep = {"%H": "hour", "%M": "minute", "%S": "second", "%f": "microsecond"}
        for mark, name in keep.items():
            if mark in form:
                parts[name] = getattr(moment, name)
        parts["microsecond"] -= parts["microsecond"] % resolution
        since = moment.replace(**parts) - dt.datetime(1970, 1, 1)
        expected.append(since // dt.timedelta(milliseconds=1))
    assert parse_times(pl.Series(written)).to_list() == expected

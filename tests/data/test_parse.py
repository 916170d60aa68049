"""Ids, times, numbers, prices, text: one value at a time."""

from __future__ import annotations

import datetime as dt

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_fast.data.parse import parse_ids, parse_prices, parse_time, parse_times
from r2ec_fast.data.report import LoadReport
from r2ec_fast.data.text import clean_column

SECOND = 1_506_902_400  # 2017-10-02T00:00:00Z


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("1506902400", SECOND),
        ("1506902400.75", SECOND),
        ("1506902400123", SECOND),
        ("1506902400123456", SECOND),
        ("1506902400123456789", SECOND),
        ("2017-10-02", SECOND),
        ("2017/10/2", SECOND),
        ("2017-10-02T00:00:00Z", SECOND),
        ("2017-10-02 02:00+02:00", SECOND),
        ("2017-10-01T19:30:00.999-0430", SECOND),
        (" 0 ", 0),
    ],
)
def test_times_in_every_notation(text, seconds):
    assert parse_times(pl.Series([text]))[0] // 1000 == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "-5", "2017-02-31", "2017-13-01", "99999999999", "inf", "nan", None]
)
def test_unreadable_times_are_null(text):
    assert parse_times(pl.Series([text], dtype=pl.String))[0] is None


def test_times_of_typed_columns():
    moment = dt.datetime(2017, 10, 2)
    assert parse_times(pl.Series([moment]))[0] == SECOND * 1000
    assert parse_times(pl.Series([moment.date()]))[0] == SECOND * 1000
    assert parse_times(pl.Series([SECOND, SECOND * 1000 + 5])).to_list() == [
        SECOND * 1000,
        SECOND * 1000 + 5,
    ]
    with pytest.raises(ValueError, match="start: expected unix seconds or ISO"):
        parse_time("later", "start")


@settings(deadline=None)
@given(st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(2099, 1, 1)), st.integers(-840, 840))
def test_iso_times_equal_the_standard_library(moment, minutes):
    zone = dt.timezone(dt.timedelta(minutes=minutes))
    aware = moment.replace(tzinfo=zone)
    milliseconds = (aware - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)
    parsed = parse_times(pl.Series([aware.isoformat()]))[0]
    assert parsed == (milliseconds if 0 <= milliseconds < 4_102_444_800_000 else None)


def test_ids_of_numbers_and_text_agree():
    as_text = parse_ids(pl.Series([" 42", "42.0", "042", "", "B0 1"]))
    assert as_text.to_list() == ["42", "42", "042", None, "B0 1"]
    assert parse_ids(pl.Series([42, 7])).to_list() == ["42", "7"]
    assert parse_ids(pl.Series([42.0, 2.5, float("nan"), None])).to_list() == [
        "42",
        "2.5",
        None,
        None,
    ]


@pytest.mark.parametrize(
    "text, price",
    [
        ("12.5", 12.5),
        ("$1,299.00", 1299.0),
        ("US $7", 7.0),
        ("€ 3", 3.0),
        ("1,2", None),
        ("—", None),
        ("from 8.99", None),
        ("5.00 - 7.00", None),
        ("-3", None),
        ("nan", None),
        ("", None),
        (None, None),
    ],
)
def test_prices(text, price):
    assert parse_prices(pl.Series([text], dtype=pl.String))[0] == price


def test_text_is_cleaned_and_counted():
    report = LoadReport()
    raw = pl.Series(
        "title",
        ["Tom &amp; Jerry&#39;s", "a\t b\n\nc\x00", "<b>Bold</b> <3", "x" * 50, "  ", None, "AT&T"],
    )
    text = clean_column(raw, report, max_chars=20, strip_tags=True)
    assert text.to_list() == [
        "Tom & Jerry's", "a b c", "Bold <3", "x" * 20, None, None, "AT&T",
    ]  # fmt: skip
    assert report.count("title: HTML entity") == 1
    assert report.count("title: HTML tag") == 1
    assert report.count("title: too long") == 1
    lists = pl.Series("description", [["one", None, "two "], [], None])
    assert clean_column(lists, report, max_chars=20).to_list() == ["one two", None, None]

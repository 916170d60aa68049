"""A known table, written in every way and read back: equal to what plain Python reads."""

from __future__ import annotations

import csv
import gzip
import io
import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_fast.data import load_interactions

ENCODINGS = ("utf8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
ENDS = ("\n", "\r\n", "\r")
# text without what ends a line or a word, so that no two ways of writing differ
TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Z")), min_size=1, max_size=6
).filter(lambda text: text.strip() == text)
ID = st.one_of(st.integers(-(10**17), 10**17).map(str), TEXT)
ROWS = st.lists(
    st.tuples(
        ID,
        ID,
        st.one_of(st.none(), st.sampled_from([0.5, 1.0, 3.25, 5.0])),
        st.integers(1_000_000_000, 1_900_000_000),
    ),
    min_size=1,
    max_size=12,
)
NAMES = ("user_id", "item_id", "rating", "timestamp")


def plain(rows) -> dict[str, list[tuple]]:
    """What a user of Python would say the rows hold: events by user, in order, without repeats."""
    out: dict[str, dict[tuple, float]] = {}
    for user, item, rating, time in rows:
        user, item = spelled(user), spelled(item)
        events = out.setdefault(user, {})
        kept = events.get((time, item))
        best = max((r for r in (kept, rating) if r is not None), default=None)
        events[time, item] = best
    return {user: sorted((t, i, r) for (t, i), r in events.items()) for user, events in out.items()}


def spelled(text: str) -> str:
    """An id as the readers write it: a whole number without ".0"."""
    whole, dot, rest = text.partition(".")
    digits = whole.removeprefix("-")
    if digits.isascii() and digits.isdigit() and (not dot or (rest and set(rest) == {"0"})):
        text = whole
    return "0" if text == "-0" else text


def read(path, **given_settings) -> dict[str, list[tuple]]:
    data = load_interactions(path, min_user_events=1, **given_settings)
    out = {}
    for u, user in enumerate(data.users.ids):
        a, b = data.offsets[u], data.offsets[u + 1]
        ratings = [None] * (b - a) if data.rating is None else data.rating[a:b].tolist()
        ratings = [None if r is None or np.isnan(r) else r for r in ratings]
        items = data.catalog.ids.decode(data.item[a:b])
        out[user] = sorted(zip(data.timestamp[a:b].tolist(), items, ratings, strict=True))
    return out


def compressed(content: bytes, how: str) -> bytes:
    return {
        "plain": lambda: content,
        "gzip": lambda: gzip.compress(content),
        "members": lambda: gzip.compress(content[:9]) + gzip.compress(content[9:]),
    }[how]()


@settings(max_examples=120, deadline=None)
@given(
    ROWS,
    st.sampled_from([",", "\t", "::", ";", "|"]),
    st.sampled_from(ENCODINGS),
    st.sampled_from(ENDS),
    st.sampled_from(["plain", "gzip", "members"]),
    st.booleans(),
)
def test_text_tables(tmp_path_factory, rows, mark, encoding, end, packing, quoted):
    if mark != ",":
        rows = [r for r in rows if not any(mark[0] in x or "\t" in x for x in r[:2])]
        if mark == "::":
            rows = [r for r in rows if ":" not in r[0] + r[1]]
    lines = [NAMES, *((u, i, "" if r is None else r, t) for u, i, r, t in rows)]
    if mark == ",":
        text = io.StringIO()
        style = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
        csv.writer(text, lineterminator=end, quoting=style).writerows(lines)
        content = text.getvalue()
    else:
        content = "".join(mark.join(map(str, line)) + end for line in lines)
    # the names of the first row are known, so any name will do but that of a gzip file
    name = {",": "log.csv", "\t": "log.tsv"}.get(mark, "log.txt")
    name += ".gz" * (packing != "plain" and quoted)
    path = tmp_path_factory.mktemp("text") / name
    path.write_bytes(compressed(content.encode(encoding), packing))
    if not rows:
        with pytest.raises(ValueError, match="no usable event among 0 rows"):
            read(path)
        return
    assert read(path) == plain(rows)


@settings(max_examples=80, deadline=None)
@given(
    ROWS,
    st.sampled_from(ENCODINGS),
    st.sampled_from(ENDS),
    st.sampled_from(["plain", "gzip", "members"]),
    st.sampled_from(["log.jsonl", "log.csv", "log.txt", "log.parquet"]),
    st.booleans(),
    st.booleans(),
)
def test_json_lines(tmp_path_factory, rows, encoding, end, packing, name, escaped, broken):
    records = [dict(zip(NAMES, row, strict=True)) for row in rows]
    lines = [json.dumps(record, ensure_ascii=escaped) for record in records]
    lines += ['{"user_id": '] * broken
    path = tmp_path_factory.mktemp("json") / name
    path.write_bytes(compressed((end.join(lines) + end).encode(encoding), packing))
    assert read(path) == plain(rows)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 200),
            st.integers(0, 120),
            st.one_of(st.none(), st.sampled_from([1.0, 2.0, 5.0])),
            st.integers(1_000_000_000, 1_900_000_000),
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(
        [pl.UInt8, pl.Int16, pl.Int64, pl.UInt64, pl.Int128, pl.Float32, pl.Float64, pl.String,
         pl.Categorical, pl.Binary, pl.Decimal(10, 2)]
    ),
    st.sampled_from([pl.Float32, pl.Float64, pl.Int8, pl.String, pl.Decimal(5, 1), pl.Categorical]),
    st.sampled_from(
        ["int", "float", "text", "ms", "us", "ns", "zone", "datetime ns", "datetime us", "iso"]
    ),
    st.sampled_from(["log.parquet", "log.csv", "log.txt"]),
    st.sampled_from(["snappy", "zstd", "gzip", "lz4", "uncompressed"]),
)  # fmt: skip
def test_parquet(tmp_path_factory, rows, ids, ratings, times, name, compression):
    users, items, rating, time = (list(column) for column in zip(*rows, strict=True))
    seconds = pl.Series(time, dtype=pl.Int64)
    moments = (seconds * 1_000_000).cast(pl.Datetime("us"))
    written = {
        "int": lambda: seconds,
        "float": lambda: seconds.cast(pl.Float64),
        "text": lambda: seconds.cast(pl.String),
        "ms": lambda: seconds * 1000,
        "us": lambda: seconds * 1_000_000,
        "ns": lambda: seconds * 1_000_000_000,
        "zone": lambda: moments.dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Kolkata"),
        "datetime ns": lambda: moments.cast(pl.Datetime("ns")),
        "datetime us": lambda: moments,
        "iso": lambda: moments.dt.strftime("%Y-%m-%d %H:%M:%S+00"),
    }[times]()

    def cast(values, kind):
        series = pl.Series(values, dtype=pl.Int64 if isinstance(values[0], int) else pl.Float64)
        if kind in (pl.Categorical, pl.Binary):
            series = series.cast(pl.String)
        return series.cast(kind)

    table = pl.DataFrame(
        {
            "user_id": cast(users, ids),
            "item_id": cast(items, ids),
            "rating": cast([np.nan if r is None else r for r in rating], pl.Float64)
            .fill_nan(None)
            .cast(pl.String if ratings == pl.Categorical else pl.Float64)
            .cast(ratings),
            "timestamp": written,
        }
    )
    path = tmp_path_factory.mktemp("parquet") / name
    table.write_parquet(path, compression=compression)
    expected = plain([(str(u), str(i), r, t) for u, i, r, t in rows])
    assert read(path) == expected

"""Block reading: any cut gives the same rows, damage is counted, refused or repaired."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_fast.data.blocks import ReadStats
from r2ec_fast.data.formats import TextFormat, guess_format
from r2ec_fast.data.reader import column_names, read_blocks

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)


def rows_of(path, form=None, columns=None, block_bytes=1 << 20, **kwargs):
    stats = ReadStats()
    form = form or guess_format(path)
    columns = columns or column_names(path, form)
    blocks = read_blocks(path, columns, form, stats, block_bytes=block_bytes, **kwargs)
    return [row for block in blocks for row in block.rows()], stats


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=20), st.integers(1, 64), st.booleans())
def test_csv_rows_do_not_depend_on_the_block(tmp_path_factory, rows, block_bytes, packed):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("first name", "b"), *rows])
    content = text.getvalue().encode()
    path = tmp_path_factory.mktemp("blocks") / ("x.csv.gz" if packed else "x.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    got, stats = rows_of(path, block_bytes=block_bytes)
    assert [tuple(x or "" for x in row) for row in got] == rows
    assert stats.rows == len(rows) and stats.broken_lines == 0
    assert stats.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stats.bytes_read == path.stat().st_size


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), st.one_of(TEXT, st.none()))),
    st.integers(1, 64),
    st.lists(st.integers(0, 30), max_size=3),
)
def test_json_rows_do_not_depend_on_the_block(tmp_path_factory, records, block_bytes, broken):
    lines = [json.dumps(record) for record in records]
    for place in broken:
        lines.insert(place, '{"a": "half')
    path = tmp_path_factory.mktemp("blocks") / "x.jsonl"
    path.write_text("\n".join([json.dumps({"a": "", "b": "", "c": ""}), *lines]) + "\n")
    got, stats = rows_of(path, columns=["a", "c"], block_bytes=block_bytes)
    assert got[1:] == [(r.get("a"), r.get("c")) for r in records]
    assert stats.broken_lines == len(broken)


def test_nested_json_is_text_on_both_ways_through(write):
    good = b'{"a": ["x", 1], "b": {"k": 1}}\n'
    fast, _ = rows_of(write("fast.jsonl", good), columns=["a", "b"])
    slow, stats = rows_of(write("slow.jsonl", good + b"{\n"), columns=["a", "b"])
    assert fast == slow == [('["x", 1]', '{"k": 1}')]
    assert stats.broken_lines == 1


def test_list_columns(write):
    form = TextFormat("jsonl", list_columns=frozenset(["d"]))
    content = '{"d": ["x", "y"]}\n{"d": "z"}\n{"d": null}\n{"d": []}\n'
    got, _ = rows_of(write("x.jsonl", content), form=form, columns=["d"])
    assert got == [(["x", "y"],), (["z"],), (None,), ([],)]


def test_truncated_gzip(write):
    content = "a,b\n" + "".join(f"{i},{i * 7919 % 1000}\n" for i in range(50_000))
    packed = gzip.compress(content.encode())
    path = write("x.csv.gz", packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"middle of its gzip stream.*truncated='keep'"):
        rows_of(path)
    rows, stats = rows_of(path, truncated="keep")
    assert stats.truncated and 10_000 < len(rows) < 50_000
    # The last row may itself be cut; every row before it is whole.
    assert rows[:-1] == [(str(i), str(i * 7919 % 1000)) for i in range(len(rows) - 1)]
    with pytest.raises(ValueError, match="truncated: expected"):
        rows_of(path, truncated="maybe")


def test_damaged_gzip(write):
    packed = bytearray(gzip.compress(b"a,b\n" + b"1,2\n" * 1000))
    packed[len(packed) // 2] ^= 0xFF
    with pytest.raises(ValueError, match="damaged gzip near byte"):
        rows_of(write("x.csv.gz", bytes(packed)))
    with pytest.raises(ValueError, match="damaged gzip"):
        rows_of(write("y.csv.gz", b"a,b\n1,2\n"))


def test_gzip_members_and_padding_are_read(write):
    path = write("x.csv.gz", gzip.compress(b"a,b\n1,2\n") + gzip.compress(b"3,4\n") + b"\0" * 64)
    rows, stats = rows_of(path)
    assert rows == [("1", "2"), ("3", "4")] and not stats.truncated


def test_bytes_that_are_not_utf8(write):
    content = b"a,b\n1,caf\xe9\n2,\xffx\n3,fine\n"
    rows, stats = rows_of(write("x.csv", content))
    assert rows == [("1", "caf\ufffd"), ("2", "\ufffdx"), ("3", "fine")]
    assert stats.replaced_lines == 2
    rows, stats = rows_of(write("x.jsonl", b'{"a":"caf\xe9"}\n{"a":"\\ud800"}\n{\n'))
    assert rows[0] == ("caf\ufffd",) and stats.replaced_lines == 1
    rows, _ = rows_of(write("y.csv", content), form=TextFormat("csv", encoding="latin-1"))
    assert rows[0] == ("1", "café")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=6), min_size=1, max_size=12))
def test_byte_repair_equals_decoding_each_line(tmp_path_factory, pieces):
    lines = [
        p.replace(b"\n", b"").replace(b"\r", b"") + b"\xff"[: i % 2] + b"x"
        for i, p in enumerate(pieces)
    ]
    path = tmp_path_factory.mktemp("bytes") / "x.txt"
    path.write_bytes(b"\n".join([b"first", *lines]))
    rows, stats = rows_of(path)
    expected = [line.decode("utf8", "replace") for line in lines]
    assert [row for (row,) in rows] == ["first", *expected]
    bad = sum("\ufffd" in e and line != e.encode() for e, line in zip(expected, lines, strict=True))
    assert stats.replaced_lines == bad


def test_too_many_fields_is_broken_and_too_few_is_null(write):
    rows, stats = rows_of(write("x.csv", "a,b\n1,2\n3\n4,5,6\n\n7,8\n"))
    assert rows == [("1", "2"), ("3", None), ("7", "8")]
    assert stats.broken_lines == 1 and stats.blank_lines == 1


def test_byte_order_mark_and_windows_line_ends(write):
    rows, _ = rows_of(write("x.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n"))
    assert rows == [("1", "2")]
    assert column_names(write("y.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n"), TextFormat("csv")) == [
        "a",
        "b",
    ]


def test_another_format_is_refused(write):
    lines = "".join(f"row {i} of some prose\n" for i in range(2_000))
    with pytest.raises(ValueError, match="more than 1%.*another format"):
        rows_of(write("x.jsonl", '{"a": "1"}\n' + lines))


@pytest.mark.parametrize("limit", [10_000, 1 << 20])
def test_a_quote_that_never_closes(write, monkeypatch, limit):
    monkeypatch.setattr("r2ec_fast.data.blocks.MAX_LINE_BYTES", limit)
    content = 'a,b\n1,x\n2,"open\n' + "3,y\n" * 10_000
    path = write("x.csv", content)
    with pytest.raises(ValueError, match="quote that never closes"):
        rows_of(path, block_bytes=100)
    rows, _ = rows_of(path, form=TextFormat("csv", quote=None))
    assert rows[1] == ("2", '"open') and len(rows) == 10_002
    rows, stats = rows_of(write("y.csv", 'a,b\n1,x\n2,"cut off he'))
    assert rows == [("1", "x")] and stats.broken_lines == 1


def test_empty_and_missing_files(write, tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        column_names(write("x.csv", ""), TextFormat("csv"))
    with pytest.raises(ValueError, match="is empty"):
        column_names(write("x.csv.gz", gzip.compress(b"")), TextFormat("csv"))
    with pytest.raises(ValueError, match="is a directory"):
        rows_of(tmp_path, form=TextFormat("csv"), columns=["a"])
    with pytest.raises(ValueError, match="kind: expected"):
        TextFormat("xml")

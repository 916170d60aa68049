"""What real files hold: each fault is counted under its own line and handled by its rule."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from r2ec_fast.data import RecDataset, load_interactions
from r2ec_fast.data.prepare import prepare_amazon, prepare_generic
from r2ec_fast.data.sources.amazon import AmazonRules, load_amazon

NOON = 1_680_350_400_000  # 2023-04-01 12:00 UTC, in ms
RULES = AmazonRules(min_items=0, history_k_core=0)


def review(user="u1", item="B000000001", stamp=NOON, **more) -> dict:
    return {"user_id": user, "parent_asin": item, "rating": 5.0, "timestamp": stamp, **more}


def meta(item="B000000001", title="A guitar", price=9.5, **more) -> dict:
    return {
        "parent_asin": item,
        "title": title,
        "price": price,
        "average_rating": 4.0,
        "rating_number": 7,
        "description": ["Good."],
        **more,
    }


BASE_REVIEWS = [review(), review(item="B000000002", stamp=NOON + 1000)]
BASE_META = [meta(), meta("B000000002", "A violin")]


@pytest.fixture
def load(tmp_path):
    """load(reviews, metadata) of records or raw lines -> (data, report)."""

    def _load(reviews=(), metadata=(), rules=RULES, **kwargs):
        paths = []
        for name, base, rows in (
            ("reviews.jsonl", BASE_REVIEWS, reviews),
            ("meta.jsonl", BASE_META, metadata),
        ):
            lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in [*base, *rows]]
            paths.append(tmp_path / name)
            paths[-1].write_bytes(b"\n".join(lines) + b"\n")
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        data = load_amazon(*paths, work, rules, **kwargs).data
        return data, data.report

    return _load


def titles(data) -> dict[str, str]:
    return dict(zip(data.catalog.ids.ids, data.catalog.titles, strict=True))


def line(report, what: str) -> str:
    """The line of the printed table that counts `what`."""
    return next(text for text in report.to_text().splitlines() if text.startswith(what))


def test_half_a_json_line(load):
    data, report = load([b'{"user_id": "u1", "parent_asin": "B00'], [b'{"title": "A tru'])
    assert line(report, "reviews.jsonl: broken line").split()[3:5] == ["1", "dropped"]
    assert line(report, "meta.jsonl: broken line").split()[3:5] == ["1", "dropped"]
    assert data.num_events == 2


def test_truncated_gzip(tmp_path):
    rows = [json.dumps(review(f"u{i % 7}", "B000000001", NOON + i)) for i in range(20_000)]
    packed = gzip.compress("\n".join(rows).encode())
    reviews = tmp_path / "reviews.jsonl.gz"
    reviews.write_bytes(packed[: len(packed) // 2])
    metadata = tmp_path / "meta.jsonl"
    metadata.write_text(json.dumps(meta()) + "\n")
    paths = {"reviews": str(reviews), "metadata": str(metadata)}
    with pytest.raises(ValueError, match="ends in the middle of its gzip stream"):
        prepare_amazon(str(tmp_path / "set"), progress=False, **paths)
    assert not (tmp_path / "set").exists()
    done = prepare_amazon(
        str(tmp_path / "set"),
        progress=False,
        truncated="keep",
        min_items=0,
        history_k_core=0,
        **paths,
    )
    assert "reviews.jsonl.gz: truncated gzip" in done.report
    assert done.dataset.data.num_users == 7


def test_times_of_every_kind(load):
    stamps = [NOON + 5000, NOON // 1000 + 6, "2023-04-01T12:00:07Z", str(NOON + 8000), "soon", None]
    rows = [review(f"v{i}", stamp=s) for i, s in enumerate(stamps)]
    data, report = load(rows)
    seconds = [int(data.timestamp[data.offsets[data.users.encode([f"v{i}"])[0]]]) for i in range(4)]
    assert seconds == [NOON // 1000 + i for i in (5, 6, 7, 8)]
    assert "v4" not in data.users and "v5" not in data.users
    assert report.count("event without readable time") == 2


def test_html_entities_and_tags(load):
    data, report = load(
        [review(item="B000000003"), review(item="B000000004")],
        [
            meta("B000000003", "Drum &amp; Sticks &quot;Set&quot;"),
            meta("B000000004", "<b>&nbsp;</b>"),
        ],
    )
    assert titles(data)["B000000003"] == 'Drum & Sticks "Set"'
    assert report.count("title: HTML entity") == 1
    assert report.count("item row with a blank title") == 1  # nothing is left to read
    assert "B000000004" not in data.catalog.ids


def test_bytes_that_are_not_utf8(load):
    row = json.dumps(meta("B000000003", "Caf_")).encode().replace(b"Caf_", b"Caf\xe9")
    data, report = load([review(item="B000000003")], [row])
    assert titles(data)["B000000003"] == "Caf\ufffd"
    assert report.count("meta.jsonl: line with non-UTF-8 bytes") == 1


@pytest.mark.parametrize(
    "price, kept", [("$1,299.00", 1), ("12.50", 1), (3, 1), ("—", 0), ("from 8.99", 0), (None, 0)]
)
def test_prices(load, price, kept):
    data, report = load([review(item="B000000003")], [meta("B000000003", price=price)])
    assert ("B000000003" in data.catalog.ids) == bool(kept)
    assert report.count("item row without a readable price") == 1 - kept
    assert report.count("price with a currency sign or commas") == int(price == "$1,299.00")


def test_duplicate_ids_with_different_titles(load):
    rows = [meta("B000000003", "Zither"), meta("B000000003", "Banjo"), meta("B000000003", None)]
    for order in (rows, rows[::-1]):
        data, report = load([review(item="B000000003")], order)
        assert titles(data)["B000000003"] == "Banjo"
        assert report.count("item id with different titles") == 1
        assert report.count("item row with a repeated id") == 1
        assert report.count("item row without title") == 1


def test_events_of_the_same_second(load):
    rows = [
        review("w", "B000000002", NOON + 10),
        review("w", "B000000003", NOON + 5),
        review("w", "B000000001", NOON + 10),
    ]
    for order in (rows, rows[::-1]):
        data, report = load(order, [meta("B000000003", "Drum")])
        a = data.offsets[data.users.encode(["w"])[0]]
        assert data.catalog.ids.decode(data.item[a:]) == ["B000000003", "B000000001", "B000000002"]
        assert report.count("event in the same second as the one before") == 2


def test_negative_ratings(load):
    data, report = load([review("w", rating=-1.0), review("x", rating=11)])
    assert report.count("rating out of range") == 2
    assert data.num_users == 3 and np.isnan(data.rating[-2:]).all()


def test_a_title_of_ten_megabytes(load):
    data, report = load(
        [review(item="B000000003"), review(item="B000000004")],
        [meta("B000000003", "word " * 2_000_000), meta("B000000004", "x" * 10_000_000)],
    )
    assert report.count("item row with a long title") == 1
    assert report.count("title: too long") == 1
    assert "B000000003" not in data.catalog.ids
    assert titles(data)["B000000004"] == "x" * 1_000


def test_ids_that_are_numbers_in_one_file(load):
    data, report = load(
        [review("w", "0000000123"), review("x", 456)], [meta(123, "One"), meta("0000000456", "Two")]
    )
    assert titles(data)["0000000123"] == "One" and titles(data)["0000000456"] == "Two"
    assert report.count("item id read as a number") == 2


def test_items_without_metadata(load):
    data, report = load([review("w", "B00000000X")])
    assert report.count("item without metadata row") == 1
    assert report.count("event of an item dropped or without row") == 1
    assert "w" not in data.users


SLOW = """
import sys, time
import r2ec_fast.data.store as store
real = store._manifest
def slow(*args):
    sys.stdout.write("writing\\n"); sys.stdout.flush()
    time.sleep(60)
    return real(*args)
store._manifest = slow
from r2ec_fast.data.prepare import prepare_generic
prepare_generic(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_runs_leave_no_half_output(write, tmp_path, how):
    log = write("in/log.csv", "user_id,item_id,timestamp\na,1,1\na,2,2\na,3,3\n")
    out = tmp_path / "out" / "set"
    prepare_generic(str(log), str(out))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    write("in/log.csv", "user_id,item_id,timestamp\nb,1,1\nb,2,2\n")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(log), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.1)
    process.send_signal(how)
    process.wait(timeout=60)
    shown = [p for p in out.iterdir() if not p.name.startswith(".")]
    assert {p.name: p.read_bytes() for p in shown} == before
    assert RecDataset.load(out).data.users.ids == ("a",)
    if how == signal.SIGINT:  # a killed process cannot clean up; its files have a hidden name
        assert len(shown) == len(list(out.iterdir()))
    assert [p.name for p in out.parent.iterdir()] == ["set"]
    prepare_generic(str(log), str(out))  # the next one does
    assert sorted(p.name for p in out.iterdir()) == sorted(before)
    assert RecDataset.load(out).data.users.ids == ("b",)


def test_a_place_that_cannot_be_written(write, tmp_path):
    log = write("log.csv", "user_id,item_id\na,1\na,2\n")
    write("file", "")
    with pytest.raises(OSError, match="output_dir: cannot write to .*file/set"):
        prepare_generic(str(log), str(tmp_path / "file" / "set"))
    if os.geteuid() == 0:
        return  # root writes everywhere
    place = tmp_path / "closed"
    place.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="output_dir: cannot write to .*closed/set"):
        prepare_generic(str(log), str(place / "set"))


def test_generic_files_are_as_robust(write):
    """The same faults in a CSV: one line each."""
    log = (
        b"user_id,item_id,timestamp,rating\n"
        b"a,1,1680350400,5\na,2.0,1680350400123,-1\na,3,2023-04-01 12:00:01,4\n"
        b"caf\xe9,1,1680350400,5\ncaf\xe9,2,1680350401,5\na,1,2,3,4,5\n"
    )
    items = 'item_id,title\n1,"Rock &amp; Roll"\n2,Two\n2,Zwei\n3,' + "y" * 5_000 + "\n"
    data = load_interactions(write("log.csv", log), items=write("items.csv", items))
    found = {x.what: x.count for x in data.report.lines if x.count}
    assert found == {
        "rating out of range": 1,
        "log.csv: broken line": 1,
        "log.csv: line with non-UTF-8 bytes": 2,
        "event in the same second as the one before": 1,
        "title: HTML entity": 1,
        "title: too long": 1,
        "item row with a repeated id": 1,
        "item id with different titles": 1,
    }
    assert data.users.ids == ("a", "caf\ufffd")

"""Bytes that are not what the name says: recognised by their content, or refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import polars as pl
import pytest

from r2ec_fast.data import load_interactions
from r2ec_fast.data.sources.amazon import AmazonRules, load_amazon

CSV = b"user_id,item_id,rating,timestamp\nu1,i1,5,1600000000\nu2,i2,4,1600000001\n"
SEQUENCES = b"u1 i1 i2\nu2 i3\n"
JSONL = b'{"user_id": "u1", "item_id": "i1", "rating": 5, "timestamp": 1600000000}\n' + (
    b'{"user_id": "u2", "item_id": "i2", "rating": 4, "timestamp": 1600000001}\n'
)


def parquet() -> bytes:
    file = io.BytesIO()
    pl.read_ndjson(JSONL).write_parquet(file)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("log.csv", CSV)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as packed:
        info = tarfile.TarInfo("log.csv")
        info.size = len(CSV)
        packed.addfile(info, io.BytesIO(CSV))
    return file.getvalue()


def load(path, **settings):
    return load_interactions(path, min_user_events=1, **settings)


def table_of(data) -> list[tuple]:
    pairs = []
    for u, user in enumerate(data.users.ids):
        for e in range(data.offsets[u], data.offsets[u + 1]):
            item = data.catalog.ids.decode([data.item[e]])[0]
            time = None if data.timestamp is None else int(data.timestamp[e])
            rating = None if data.rating is None else float(data.rating[e])
            pairs.append((user, item, rating, time))
    return pairs


EXPECTED = [("u1", "i1", 5.0, 1_600_000_000), ("u2", "i2", 4.0, 1_600_000_001)]
READ = {
    "cr.csv": CSV.replace(b"\n", b"\r"),
    "cr.txt": CSV.replace(b"\n", b"\r"),
    "cr.jsonl": JSONL.replace(b"\n", b"\r"),
    "cr.tsv": CSV.replace(b",", b"\t").replace(b"\n", b"\r"),
    "crlf.txt": CSV.replace(b"\n", b"\r\n"),
    "mixed.csv": CSV.replace(b"1600000000\n", b"1600000000\r"),
    "mixed header.csv": CSV.replace(b"timestamp\n", b"timestamp\r"),
    "gzip.csv": gzip.compress(CSV),
    "gzip.txt": gzip.compress(CSV),
    "gzip.jsonl": gzip.compress(JSONL),
    "upper.csv.GZ": gzip.compress(CSV),
    "UPPER.CSV": CSV,
    "upper.JSONL.Gz": gzip.compress(JSONL),
    "cr in gzip.csv.gz": gzip.compress(CSV.replace(b"\n", b"\r")),
    "csv.parquet": CSV,
    "csv.txt": CSV,
    "csv.tsv": CSV,
    "csv.jsonl": CSV,
    "csv.inter": CSV,
    "tabs.csv": CSV.replace(b",", b"\t"),
    "tabs.txt": CSV.replace(b",", b"\t"),
    "semicolons.txt": CSV.replace(b",", b";"),
    "colons.txt": CSV.replace(b",", b"::"),
    "bars.txt": CSV.replace(b",", b"|"),
    "spaces.txt": CSV.replace(b",", b" "),
    "parquet.csv": parquet(),
    "parquet.txt": parquet(),
    "parquet.jsonl": parquet(),
    "jsonl.csv": JSONL,
    "jsonl.txt": JSONL,
    "jsonl.parquet": JSONL,
    "jsonl.tsv.gz": gzip.compress(JSONL),
    "mark.csv": b"\xef\xbb\xbf" + CSV,
    "mark.txt": b"\xef\xbb\xbf" + CSV,
    "mark.jsonl": b"\xef\xbb\xbf" + JSONL,
    "utf-16.csv": CSV.decode().encode("utf-16"),
    "utf-16-be.csv": b"\xfe\xff" + CSV.decode().encode("utf-16-be"),
    "utf-16 without a mark.csv": CSV.decode().encode("utf-16-le"),
    "utf-16 without a mark.tsv": CSV.replace(b",", b"\t").decode().encode("utf-16-be"),
    "utf-16.jsonl": JSONL.decode().encode("utf-16"),
    "utf-32.csv": CSV.decode().encode("utf-32"),
    "utf-16 in gzip.csv.gz": gzip.compress(CSV.decode().encode("utf-16")),
    "utf-16 with cr.csv": CSV.replace(b"\n", b"\r").decode().encode("utf-16"),
}


@pytest.mark.parametrize("name", READ)
def test_read_by_content(write, name):
    assert table_of(load(write(name, READ[name]))) == EXPECTED


@pytest.mark.parametrize("name", ["cr.csv", "gzip.csv", "utf-16.csv"])
def test_the_report_says_what_was_recognised(write, name):
    report = load(write(name, READ[name])).report
    what = {"cr": "carriage return", "gzip": "gzip", "utf-16": "UTF-16"}[name.removesuffix(".csv")]
    assert [x.action for x in report.lines if what in x.what and x.count] == ["noted"]


@pytest.mark.parametrize("name", ["csv", "gz", "utf-16", "tabs", "parquet", "json"])
def test_item_tables_too(write, name):
    table = b"item_id,title\ni1,One\ni2,Two\n"
    file = io.BytesIO()
    pl.read_csv(table).write_parquet(file)
    content = {
        "csv": ("items.txt", table),
        "gz": ("items.csv", gzip.compress(table)),
        "utf-16": ("items.csv", table.decode().encode("utf-16")),
        "tabs": ("items.csv", table.replace(b",", b"\t")),
        "parquet": ("items.csv", file.getvalue()),
        "json": ("items.csv", b'{"item_id": "i1", "title": "One"}\n{"item_id":"i2","title":"Two"}'),
    }[name]
    data = load(write("log.csv", CSV), items=write(*content))
    assert data.catalog.titles == ["One", "Two"]


REFUSED = {
    "array.json": (b'[{"user_id": 1, "item_id": 2}]', "holds one JSON array; expected JSON Lines"),
    "array over lines.json": (b'[\n{"user_id": 1, "item_id": 2}\n]', "holds one JSON array"),
    "array.csv": (b'[{"user_id": 1, "item_id": 2}]', "holds one JSON array"),
    "pretty.jsonl": (json.dumps({"user_id": 1, "item_id": 2}, indent=1).encode(), "several lines"),
    "bz2.csv": (bz2.compress(CSV), "holds bzip2"),
    "xz.csv": (lzma.compress(CSV), "holds xz"),
    "zstd.csv": (b"\x28\xb5\x2f\xfd\x24\x05" + CSV, "holds Zstandard"),
    "zip.csv": (zipped(), "holds a zip archive"),
    "zip.parquet": (zipped(), "holds a zip archive"),
    "tar.csv.gz": (tarred(), "holds a tar archive inside gzip"),
    "gz twice.csv.gz": (gzip.compress(gzip.compress(CSV)), "holds gzip inside gzip"),
    "parquet.parquet.gz": (gzip.compress(parquet()), "holds Parquet inside gzip"),
    "plain.csv.gz": (CSV, "damaged gzip near byte 0"),
    "cut.parquet": (parquet()[:-30], "is Parquet that stops early"),
    "damaged.parquet": (parquet()[:40] + b"\xff" * 40 + parquet()[80:], "is not readable Parquet"),
    "cut.csv.gz": (gzip.compress(CSV)[:60], "middle of its gzip stream"),
    "garbage.csv": (bytes(range(256)) * 4, "bytes that are no text"),
    "garbage.txt": (bytes(range(256)) * 4, "bytes that are no text"),
    "garbage.parquet": (bytes(range(256)) * 4, "bytes that are no text"),
    "prose.parquet": (b"Some words.\nMore words.\n", "is no Parquet file"),
    "excel.csv": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600, "holds an old Excel"),
    "page.csv": (b"<!DOCTYPE html>\n<html></html>\n", "has no column for 'user_id'"),
    "empty.csv": (b"", "is empty"),
    "empty.parquet": (b"", "is empty"),
    "blank.csv": (b" \n\n", "is empty"),
    "mark alone.csv": (b"\xef\xbb\xbf", "is empty"),
    "utf-16 mark alone.csv": (b"\xff\xfe", "is empty"),
    "empty.csv.gz": (gzip.compress(b""), "is empty"),
    # no header
    "no header.csv": (CSV.split(b"\n", 1)[1], "no column for 'user_id'"),
    "no header.inter": (CSV.split(b"\n", 1)[1].replace(b",", b"\t"), "no column for 'user_id'"),
    "no header, tabs.txt": (CSV.split(b"\n", 1)[1].replace(b",", b"\t"), "with ratings"),
    "no header, commas.txt": (CSV.split(b"\n", 1)[1], "with ratings"),
    "no header, colons.txt": (CSV.split(b"\n", 1)[1].replace(b",", b"::"), "separated by '::'"),
    "no header, bars.txt": (CSV.split(b"\n", 1)[1].replace(b",", b"|"), "separated by '|'"),
    "dates.txt": (b"u1 i1 2023-07-01\nu2 i2 2023-07-02\n", "with times"),
    "ratings.txt": (b"1 10 4.5\n2 11 3.0\n", "with ratings"),
    "whole ratings.txt": (b"1 10 4\n2 11 3\n3 19 1\n4 22 5\n5 9 2\n", "with ratings"),
    "ratings by tabs.txt": (b"1\t10\t5\n2\t11\t3\n", "with ratings"),
    "ratings by commas.txt": (b"1,10,5\n2,11,3\n4,1,1\n", "with ratings"),
    "unknown header.txt": (b"who what when\nu1 i1 1600000000\nu2 i2 1600000001\n", "with times"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(write, name):
    content, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        load(write(name, content))
    assert name in str(caught.value)


def test_sequences_are_still_sequences(write):
    for name, content in {
        "a.txt": SEQUENCES,
        "cr.txt": SEQUENCES.replace(b"\n", b"\r"),
        "mixed.txt": b"u1 i1 i2\ru2 i3\n",
        "gz.txt": gzip.compress(SEQUENCES),
        "utf-16.txt": SEQUENCES.decode().encode("utf-16"),
    }.items():
        found = [(user, item) for user, item, *_ in table_of(load(write(name, content)))]
        assert found == [("u1", "i1"), ("u1", "i2"), ("u2", "i3")], name
    numbers = write("isbn.txt", "1 0345337700 0345337701\n2 0345337702 0345337703\n")
    assert load(numbers).num_events == 4
    pairs = write("pairs.txt", "1 5\n1 4\n2 3\n")  # SASRec's files
    assert load(pairs).num_events == 3
    table = write("as it is.txt", "1 10 4.5\n2 11 3.0\n")
    assert load(table, format="sequences").num_events == 4


def test_directories_in_place_of_files(write, tmp_path):
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(ValueError, match="no MovieLens directory"):
        load(tmp_path / "dir.csv")
    with pytest.raises(ValueError, match="is a directory"):
        load(tmp_path / "dir.csv", format="csv")
    with pytest.raises(ValueError, match="is a directory"):
        load(write("log.csv", CSV), items=tmp_path / "dir.csv")


def test_amazon_files_too(tmp_path, write):
    reviews = "user_id,parent_asin,rating,timestamp\nu,B000000001,5,1680350400000\n"
    meta = {"parent_asin": "B000000001", "title": "A guitar", "price": 9.5}
    rules = AmazonRules(min_items=0, history_k_core=0)
    for name, content in {
        "reviews.csv": reviews.encode("utf-16"),
        "packed.csv": gzip.compress(reviews.encode()),
        "cr.csv": reviews.replace("\n", "\r").encode(),
        "csv.parquet": reviews.encode(),
    }.items():
        metadata = write("meta.csv", gzip.compress(json.dumps(meta).encode()))
        data = load_amazon(write(name, content), metadata, tmp_path, rules).data
        assert data.users.ids == ("u",) and data.catalog.titles == ["A guitar"]
    for title in (
        pl.Series([5]),
        pl.Series([["A", "guitar"]]),
        pl.Series(["A"], dtype=pl.Categorical),
    ):
        table = pl.DataFrame({"parent_asin": ["B000000001"], "title": title, "price": [9.5]})
        table.write_parquet(tmp_path / "meta.parquet")
        load_amazon(write("r.csv", reviews), tmp_path / "meta.parquet", tmp_path, rules)
    with pytest.raises(ValueError, match="one JSON array"):
        load_amazon(write("r.csv", reviews), write("m.json", json.dumps([meta])), tmp_path, rules)


def test_a_line_break_in_a_quoted_header(write):
    for end in ("\n", "\r\n", "\r"):
        text = f'"user_id","item{end}id","a, ""b"" note",rating{end}u1,i1,x,5{end}u2,i2,y,4{end}'
        path = write("log.csv", text.encode())
        inside = "\n" if end == "\r" else end  # lone returns are line feeds throughout
        data = load(path, columns={"item_id": f"item{inside}id"})
        assert [row[:3] for row in table_of(data)] == [("u1", "i1", 5), ("u2", "i2", 4)]


def test_bytes_that_would_make_two_ids_one_are_refused(write):
    rows = "user_id,item_id\ncafé,1\n{},2\n"
    with pytest.raises(ValueError, match=r"ids 'caf\\xe9' and 'caf\\xe8'.*'user_id'.*iconv"):
        load(write("a.csv", rows.format("cafè").encode("cp1252")))
    assert load(write("b.csv", rows.format("café").encode("cp1252"))).num_users == 1
    with pytest.raises(ValueError, match="would become one"):
        load(write("c.txt", "u café\nv cafè\n".encode("cp1252")))
    text = '{"user_id": "%s", "item_id": 1}\n'
    with pytest.raises(ValueError, match=r"'\\ud800' and '\\ud801'"):
        load(write("d.jsonl", text % "\\ud800" + text % "\\ud801"))
    with pytest.raises(ValueError, match="would become one"):
        load(write("e.csv", CSV), items=write("f.csv", b"item_id,title\n\xe9,One\n\xe8,Two\n"))
    with pytest.raises(ValueError, match="would become one"):  # one was damaged before
        load(write("j.csv", b"user_id,item_id\ncaf\xef\xbf\xbd,1\ncaf\xe9,1\n"))
    blocks = b"user_id,item_id\n" + b"\xe9,1\n" + b"x,2\n" * 3_000_000 + b"\xe8,1\n"
    with pytest.raises(ValueError, match="would become one"):
        load(write("g.csv", blocks))
    titles = write("h.csv", b"item_id,title\ni1,caf\xe9\ni2,caf\xe8\n")  # titles may be equal
    assert load(write("i.csv", CSV), items=titles).catalog.titles == ["caf\ufffd"] * 2


def test_halves_of_characters_do_not_become_one(write):
    text = '{"user_id": "a\\ud83d", "item_id": 1}\n{"user_id": "\\ud83d\\ude00", "item_id": 1}\n'
    data = load(write("a.jsonl", text))
    assert data.users.ids == ("a\ufffd", "😀")
    assert data.report.count("a.jsonl: line with half a character") == 1

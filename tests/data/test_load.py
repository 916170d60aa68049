"""load_interactions: every format, every rule, every refusal, against plain expectations."""

from __future__ import annotations

import gzip
import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_fast.data import RecDataset, load_interactions, make_splits

ITEMS = "item_id,title,description,material\n1,One,first,oak\n2,Two,,\n3,Three,third,steel\n"


def events_of(data) -> dict[str, list]:
    """{user: [(item, seconds, rating)]} in external ids."""
    out = {}
    for u, user in enumerate(data.users.ids):
        a, b = data.offsets[u], data.offsets[u + 1]
        time = [None] * (b - a) if data.timestamp is None else data.timestamp[a:b].tolist()
        rating = [None] * (b - a) if data.rating is None else data.rating[a:b].tolist()
        items = data.catalog.ids.decode(data.item[a:b])
        out[user] = list(zip(items, time, rating, strict=True))
    return out


def test_csv(write):
    path = write(
        "log.csv",
        "userId,movieId,weight,datetime\nb,2,4,20\nb,1,3.5,10\na,3,,5\na,1,1,2017-10-02\n",
    )
    data = load_interactions(
        path, items=write("items.csv", ITEMS), item_columns={"wood": "material"}
    )
    events = events_of(data)
    assert list(events) == ["a", "b"]
    assert events["b"] == [("1", 10, 3.5), ("2", 20, 4.0)]
    assert [e[:2] for e in events["a"]] == [("3", 5), ("1", 1_506_902_400)]
    assert np.isnan(events["a"][0][2])
    assert data.catalog.titles == ["One", "Two", "Three"]
    assert data.catalog.fields.columns == ["wood", "title", "description"]
    assert data.catalog.fields["wood"].to_list() == ["oak", None, "steel"]


@pytest.mark.parametrize("form", ["tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz"])
def test_other_tables_equal_the_csv(write, tmp_path, form):
    table = pl.DataFrame(
        {
            "user_id": ["a", "b", "a"],
            "item_id": [1, 2, 3],
            "timestamp": [5, 6, 4],
            "rating": [1, 2, 3],
        }
    )
    items = write("items.csv", ITEMS)
    expected = events_of(
        load_interactions(write("x.csv", table.write_csv()), items=items, min_user_events=1)
    )
    path = tmp_path / f"log.{form}"
    content = {
        "tsv": lambda: table.write_csv(separator="\t").encode(),
        "csv.gz": lambda: gzip.compress(table.write_csv().encode()),
        "jsonl": lambda: table.write_ndjson().encode(),
        "jsonl.gz": lambda: gzip.compress(table.write_ndjson().encode()),
    }
    if form == "parquet":
        table.write_parquet(path)
    else:
        path.write_bytes(content[form]())
    assert events_of(load_interactions(path, items=items, min_user_events=1)) == expected


def test_recbole(write):
    path = write(
        "set.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t2\t4\t10.0\n7\t1\t5\t9.0\n",
    )
    write(
        "set.item", 'item_id:token\tmovie_title:token_seq\tgenre:token_seq\n1\tA "B\tX|Y\n2\tC\t\n'
    )
    data = load_interactions(path)
    assert events_of(data) == {"7": [("1", 9, 5.0), ("2", 10, 4.0)]}
    assert data.catalog.titles == ['A "B', "C"]
    assert data.catalog.fields["genres"].to_list() == ["X, Y", None]


def movielens_files(layout: str) -> dict[str, bytes]:
    """The same three ratings and two movies in each published layout."""
    if layout == "csv":
        return {
            "ratings.csv": b"userId,movieId,rating,timestamp\n1,2,4.0,20\n1,10,3.0,10\n",
            "movies.csv": 'movieId,title,genres\n2,"Amélie, a (2001)",Comedy|War\n10,B,(no genres '
            "listed)\n".encode(),
        }
    if layout == "1m":
        return {
            "ratings.dat": b"1::2::4::20\n1::10::3::10\n",
            "movies.dat": "2::Amélie, a (2001)::Comedy|War\n10::B::\n".encode("latin-1"),
        }
    flags = ["0"] * 19
    flags[5] = flags[17] = "1"  # Comedy, War
    first = "|".join(["2", "Amélie, a (2001)", "01-Jan-2001", "", "http://x", *flags])
    second = "|".join(["10", "B", "", "", "", *["0"] * 19])
    return {
        "u.data": b"1\t2\t4\t20\n1\t10\t3\t10\n",
        "u.item": f"{first}\n{second}\n".encode("latin-1"),
    }


@pytest.mark.parametrize("layout", ["csv", "1m", "100k"])
def test_movielens_layouts(write, tmp_path, layout):
    for name, content in movielens_files(layout).items():
        write(name, content)
    data = load_interactions(tmp_path)
    assert events_of(data) == {"1": [("10", 10, 3.0), ("2", 20, 4.0)]}
    by_id = dict(zip(data.catalog.ids.ids, data.catalog.fields.rows(named=True), strict=True))
    assert by_id["2"] == {"title": "Amélie, a (2001)", "genres": "Comedy, War"}
    assert by_id["10"] == {"title": "B", "genres": None}


def test_sequences_keep_their_order_and_repeats(write):
    path = write("seq.txt", "u 3 1 1\nv 2\n\nu 2\n")
    data = load_interactions(path, items=write("items.csv", ITEMS), min_user_events=1)
    assert [e[0] for e in events_of(data)["u"]] == ["3", "1", "1", "2"]
    assert data.timestamp is None and data.rating is None
    assert data.report.count("further line of a user") == 1
    assert data.report.count("seq.txt: blank line") == 1


def test_every_bad_row_is_counted(write):
    rows = [
        "user_id,item_id,timestamp,rating",
        "a,1,10,5",
        "a,1,10,4",  # duplicate, lower rating
        "a,2,11,-1",  # rating out of range
        "a,3,12,good",  # rating unreadable
        ",1,13,5",  # no user
        "a,,13,5",  # no item
        "a,1,yesterday,5",  # no time
        "a,9,14,5",  # unknown item
        "a,4,15,5",  # item without title
        "b,1,16,5",  # user with one event
        "a,1,17,5,extra,fields",  # broken line
        "",
        "a,1,11,5",
    ]
    items = "item_id,title\n1,One\n2,Two\n2,Two again\n3,Three\n4, \n,Nothing\n"
    data = load_interactions(write("log.csv", "\n".join(rows)), items=write("items.csv", items))
    report = data.report
    expected = {
        "duplicate event": 1,
        "rating out of range": 1,
        "rating unreadable": 1,
        "event without user id": 1,
        "event without item id": 1,
        "event without readable time": 1,
        "item not in the item table": 1,
        "item without title": 1,
        "event of an item without text": 2,
        "user with too few events": 1,
        "event of a user with too few events": 1,
        "log.csv: broken line": 1,
        "log.csv: blank line": 1,
        "item row with a repeated id": 1,
        "item id with different titles": 1,
        "item row without id": 1,
        "event in the same second as the one before": 1,
    }
    assert {what: report.count(what) for what in expected} == expected
    assert [e[0] for e in events_of(data)["a"]] == ["1", "1", "2", "3"]
    assert data.rating[0] == 5 and np.isnan(data.rating[2:]).all()
    assert data.catalog.titles == ["One", "Two", "Three"]
    starts = ("event", "duplicate event")
    lines = [x for x in report.lines if x.action == "dropped" and x.what.startswith(starts)]
    assert data.num_events == 11 - sum(x.count for x in lines)  # 11 rows are records
    for line in report.lines:
        assert line.count == 0 or line.what in report.to_text()


def test_numbers_in_one_file_and_text_in_the_other(write, tmp_path):
    items = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": [1.0, 2.0], "title": ["One", "Two"]}).write_parquet(items)
    data = load_interactions(write("log.csv", "user_id,item_id\na,1\na,2.0\n"), items=items)
    assert [e[0] for e in events_of(data)["a"]] == ["1", "2"]


def test_rules_that_can_be_chosen(write):
    log = write(
        "log.csv",
        "user_id,item_id,timestamp,rating\na,1,1,5\na,2,2,2\na,1,3,4\na,9,4,4\nb,1,1,4\nb,3,2,\n",
    )
    items = write("items.csv", ITEMS)

    def ids(**settings):
        data = load_interactions(log, items=items, **settings)
        return {u: [e[0] for e in ev] for u, ev in events_of(data).items()}

    assert ids() == {"a": ["1", "2", "1"], "b": ["1", "3"]}
    assert ids(repeats="first") == {"a": ["1", "2"], "b": ["1", "3"]}
    assert ids(repeats="last") == {"a": ["2", "1"], "b": ["1", "3"]}
    assert ids(min_rating=4) == {"a": ["1", "1"]}
    assert ids(missing_text="use_id") == {"a": ["1", "2", "1", "9"], "b": ["1", "3"]}
    assert ids(k_core=2) == {"a": ["1", "1"]}
    used = load_interactions(log, items=items, min_rating=4, keep_unused_items=False)
    assert used.catalog.titles == ["One"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40),
    st.integers(2, 3),
)
def test_k_core_equals_the_plain_loop(tmp_path_factory, pairs, k):
    rows = [(f"u{u}", f"i{i}", n) for n, (u, i) in enumerate(pairs)]
    expected = list(rows)
    while True:
        users = [u for u, _, _ in expected]
        items = [i for _, i, _ in expected]
        kept = [r for r in expected if users.count(r[0]) >= k and items.count(r[1]) >= k]
        if len(kept) == len(expected):
            break
        expected = kept
    path = tmp_path_factory.mktemp("core") / "log.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    if not expected:
        with pytest.raises(ValueError, match="k_core"):
            load_interactions(path, k_core=k, min_user_events=1)
        return
    data = load_interactions(path, k_core=k, min_user_events=1)
    got = [(u, i, t) for u, ev in events_of(data).items() for i, t, _ in ev]
    assert sorted(got) == sorted(expected)


def test_shuffled_rows_give_the_same_data(write):
    rng = np.random.default_rng(0)
    rows = [f"u{u},i{i},{t},{r}" for u, i, t, r in rng.integers(0, 9, (300, 4))]
    items = [f"i{i},Title {i} {j}" for i in range(9) for j in range(2)]

    def load(order, name):
        log = write(
            f"{name}.csv",
            "\n".join(["user_id,item_id,timestamp,rating", *[rows[k] for k in order]]),
        )
        table = write(
            f"{name}-items.csv", "\n".join(["item_id,title", *[items[k % 18] for k in order[:18]]])
        )
        return load_interactions(log, items=table, missing_text="use_id")

    one = load(np.arange(300), "one")
    two = load(np.concatenate([rng.permutation(18), rng.permutation(np.arange(18, 300))]), "two")
    assert events_of(one) == events_of(two)
    assert one.catalog.titles == two.catalog.titles


BAD = [
    ("missing column", "user,thing\na,1\n", ITEMS, {}, "columns: .*no column for 'item_id'"),
    ("empty file", "", ITEMS, {}, "is empty"),
    ("header only", "user_id,item_id\n", ITEMS, {}, "no usable event among 0 rows"),
    ("unknown item", "user_id,item_id\na,1\na,9\n", ITEMS, {"missing_text": "refuse"}, "'9'"),
    ("no title", "user_id,item_id\na,1\na,2\n", "item_id,title\n1,One\n2,\n",
     {"missing_text": "refuse"}, "1 items have no title, e.g. '2'"),
    ("other ids", "user_id,item_id\na,x\na,y\n", ITEMS, {}, "no event's item is in the item table"),
    ("configured column", "user_id,item_id\na,1\n", ITEMS, {"columns": {"rating": "stars"}},
     "no column 'stars'"),
    ("configured name", "user_id,item_id\na,1\n", ITEMS, {"columns": {"ratings": "item_id"}},
     r"unknown names \['ratings'\]"),
    ("format", "user_id,item_id\na,1\n", ITEMS, {"format": "xml"}, "format: expected one of"),
    ("repeats", "user_id,item_id\na,1\n", ITEMS, {"repeats": "some"}, "repeats: expected one of"),
    ("short users", "user_id,item_id\na,1\n", ITEMS, {}, "no user has 2 events"),
    ("all bad times", "user_id,item_id,time\na,1,x\n", ITEMS, {}, "event without readable time: 1"),
    ("table without rows", "user_id,item_id\na,1\n", "item_id,title\n", {}, "has no rows"),
    ("wrong separator", "user_id;item_id\na;1\n", ITEMS, {}, r"its columns: \['user_id;item_id'\]"),
    ("header twice", "user_id,item_id,item_id\na,1,2\n", ITEMS, {}, "repeats the columns"),
]  # fmt: skip


@pytest.mark.parametrize("name, log, items, settings, message", BAD, ids=[b[0] for b in BAD])
def test_refusals_name_the_problem(write, name, log, items, settings, message):
    with pytest.raises(ValueError, match=message):
        load_interactions(write("log.csv", log), items=write("items.csv", items), **settings)


def test_missing_paths(tmp_path, write):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_interactions(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="no MovieLens directory"):
        load_interactions(tmp_path)
    with pytest.raises(ValueError, match="cannot tell the format"):
        load_interactions(write("log.xyz", "a"))


def test_json_keys_may_be_missing_in_a_record(write):
    lines = [{"user_id": "a", "item_id": "1", "rating": 5}, {"user_id": "a", "item_id": 2}]
    path = write("log.jsonl", "\n".join(map(json.dumps, lines)))
    data = load_interactions(path, items=write("items.csv", ITEMS))
    assert [e[0] for e in events_of(data)["a"]] == ["1", "2"]
    assert data.rating[0] == 5 and np.isnan(data.rating[1])


@pytest.mark.real_data
@pytest.mark.parametrize(
    "path, items, users, catalog, events",
    [
        ("ml-latest-small", None, 610, 9_742, 100_836),
        ("amazon-giftcards-5core/interactions.csv", "amazon-giftcards-5core/items.csv", 458, 148,
         2_969),
        ("amazon-beauty-5core/sequences.txt", "amazon-beauty-5core/items.tsv", 22_363, 12_094,
         198_371),
    ],
)  # fmt: skip
def test_real_data_sets(real_data, tmp_path, path, items, users, catalog, events):
    items = None if items is None else real_data / items
    data = load_interactions(real_data / path, items=items)
    assert (data.num_users, data.num_items, data.num_events) == (users, catalog, events)
    dataset = make_splits(data, "leave_one_out" if data.timestamp is None else "time")
    dataset.save(tmp_path / "set")
    again = RecDataset.load(tmp_path / "set")
    assert events_of(again.data) == events_of(data)
    assert (again.target(again.test) == dataset.target(dataset.test)).all()

"""The items while they change: lookups, versions, rollbacks, filters, and the next start."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from _support.shards import Shards
from _support.toy import toy_dataset, toy_model

from r2ec_fast.data import UnknownIdError
from r2ec_fast.serve.catalog.live import LiveCatalog, VersionGone
from r2ec_fast.serve.catalog.records import log_header
from r2ec_fast.serve.catalog.table import KEPT_VERSIONS, LocalTable
from r2ec_fast.serve.catalog.write_ahead import WriteAheadLog

CATALOG = toy_dataset().data.catalog


class Opened:
    """A catalog over a log, as a process has it; `again` is the next process."""

    def __init__(self, path, shards):
        self.path, self.shards = path, shards
        model = toy_model(dtype=torch.float32).eval()
        model.set_items(model.encode_items(CATALOG))
        self.log = WriteAheadLog(path, log_header(model, CATALOG))
        rows = LocalTable(model.index)
        if shards:
            rows = Shards(model.index, shards).table(self.log)
        self.catalog = LiveCatalog(model, CATALOG, rows, self.log)

    def again(self) -> Opened:
        self.log.close()
        return Opened(self.path, self.shards)

    def put(self, *items, **fields) -> int:
        given = [(i, {"title": f"item {i}"} | fields) for i in items]
        return self.catalog.put(given, self.catalog.encode(given))


@pytest.fixture(params=[0, 3], ids=["in this process", "three shards"])
def opened(tmp_path, request):
    return Opened(tmp_path / "items.log", request.param)


def table(catalog: LiveCatalog) -> dict:
    """Everything that a search can find: scores and titles by id."""
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found, _ = catalog.search(states[:, : catalog.width], 100, exclude=[[]] * 3)
    return [{i: (t, s) for i, t, s in zip(f.ids, f.titles, f.scores, strict=True)} for f in found]


def test_items_are_added_changed_removed_and_found(opened):
    catalog = opened.catalog
    assert (catalog.version, len(catalog), catalog.items.get("i3").row) == (0, 16, 3)
    assert opened.put("n1", "n2", price=3.5) == 1
    assert catalog.items.get("n1").fields == {"title": "item n1", "price": 3.5}
    assert (catalog.items.get("n2").row, catalog.items.get("n2").version, len(catalog)) == (
        17,
        1,
        18,
    )
    assert opened.put("i3", title="brand new") == 2
    assert catalog.items.find("Brand NEW").id == "i3"
    assert catalog.items.get("i3").row == 18 and catalog.items.rows_of("i3") == [3, 18]
    with pytest.raises(UnknownIdError, match="neither an item id nor a title"):
        catalog.items.find(CATALOG.titles[3])
    assert catalog.delete(["n1", "i0"]) == 3
    with pytest.raises(UnknownIdError, match="unknown item 'i0'"):
        catalog.items.get("i0")
    # who bought it can still say so
    assert catalog.items.find("i0").fields["title"] == CATALOG.titles[0]
    assert [item.id for item in catalog.items.search("item n", 5)] == ["n2"]
    with pytest.raises(UnknownIdError, match="'zz'"):
        catalog.delete(["i1", "zz"])
    assert (catalog.version, len(catalog)) == (3, 16)


def test_what_was_changed_is_there_at_the_next_start(opened):
    opened.put("n1", "n2", price=3.5)
    opened.put("i3", title="brand new")
    opened.catalog.delete(["i0"])
    opened.catalog.rollback(1)
    before, version = table(opened.catalog), opened.catalog.version
    again = opened.again().catalog
    assert again.version == version == 4
    assert table(again) == before
    assert again.items.get("i3").fields["title"] == CATALOG.titles[3]
    assert again.items.get("n2").fields == {"title": "item n2", "price": 3.5}


def test_a_rollback_brings_back_exactly_what_was(opened):
    """Random changes; every version that is still known comes back, bit for bit."""
    rng = random.Random(7)
    names = [f"i{n}" for n in range(16)] + [f"n{n}" for n in range(6)]
    states = [table(opened.catalog)]
    for step in range(24):
        there = [n for n in names if _is_there(opened.catalog, n)]
        if rng.random() < 0.6:
            opened.put(*rng.sample(names, 3), title=f"version {step}")
        elif rng.random() < 0.6:
            opened.catalog.delete(rng.sample(there, 2))
        else:
            version = rng.randrange(len(states))
            opened.catalog.rollback(version)
            assert table(opened.catalog) == states[version]
        states.append(table(opened.catalog))
    for version in rng.sample(range(25), 10):
        opened.catalog.rollback(version)
        assert table(opened.catalog) == states[version]
    assert table(opened.again().catalog) == states[version]


def _is_there(catalog: LiveCatalog, name: str) -> bool:
    try:
        return bool(catalog.items.get(name))
    except UnknownIdError:
        return False


def test_versions_that_are_too_old_are_gone(opened):
    for step in range(KEPT_VERSIONS + 2):
        opened.put("n1", title=f"version {step}")
    last = KEPT_VERSIONS + 2
    with pytest.raises(VersionGone, match=f"expected one of 2..{last}.* got 1"):
        opened.catalog.rollback(1)
    with pytest.raises(VersionGone, match="got 99"):
        opened.catalog.rollback(99)
    assert opened.catalog.rollback(2) == last + 1
    assert opened.catalog.items.get("n1").fields["title"] == "version 1"


@pytest.mark.parametrize("call", ["append", "change"])
def test_a_change_that_fails_leaves_nothing(opened, monkeypatch, call):
    opened.put("n1")
    before = table(opened.catalog)
    target = opened.log if call == "append" else opened.catalog._table

    def failing(*_):
        raise OSError(28, "No space left") if call == "append" else MemoryError("no room")

    monkeypatch.setattr(target, call, failing)
    with pytest.raises((OSError, MemoryError)):
        opened.put("n2", "i0", title="never")
    with pytest.raises((OSError, MemoryError)):
        opened.catalog.delete(["n1"])
    monkeypatch.undo()
    assert (opened.catalog.version, table(opened.catalog)) == (1, before)
    assert opened.put("n3") == 2
    assert opened.catalog.items.find("item n3").id == "n3"
    again = opened.again()
    assert again.catalog.version == 2 and _is_there(again.catalog, "n3")
    assert not _is_there(again.catalog, "n2")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"title": {"contains": "LAMP"}}, ["i3", "i7", "i11", "i15"]),
        ({"title": "red mug"}, ["i1"]),
        ({"title": ["red mug", "white bowl", "nothing"]}, ["i1", "i14"]),
        ({"price": {"min": 2}}, ["n1"]),
        ({"price": {"min": 2, "max": 3}}, []),
        ({"price": {"max": 3.5}, "title": {"contains": "item"}}, ["n1"]),
    ],
)
def test_filters(tmp_path, wanted, expected):
    from r2ec_fast.data import Catalog

    model = toy_model(dtype=torch.float32).eval()
    import polars as pl

    priced = Catalog(CATALOG.ids, CATALOG.fields.with_columns(pl.lit(1.0).alias("price")))
    model.set_items(model.encode_items(priced))
    catalog = LiveCatalog(model, priced, LocalTable(model.index))
    new = [("n1", {"title": "item n1", "price": 3.5})]
    catalog.put(new, catalog.encode(new))
    found, _ = catalog.search(torch.ones(1, catalog.width), 50, exclude=[[]], wanted=wanted)
    assert sorted(found[0].ids) == sorted(expected)
    other, _ = catalog.search(
        torch.ones(1, catalog.width), 50, exclude=[[]], wanted=wanted, include=["i1", "n1", "gone"]
    )
    assert sorted(other[0].ids) == sorted(set(expected) & {"i1", "n1"})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"colour": "red"}, "no column 'colour'"),
        ({"title": {"min": [1]}}, "title: expected a value"),
        ({"title": []}, "title: expected a value"),
        ({"title": {"around": 3}}, "title: expected a value"),
        ({"title": 3}, "title: the column holds String"),
    ],
)
def test_a_filter_that_fits_no_column_is_refused(opened, wanted, message):
    with pytest.raises(ValueError, match=message):
        opened.catalog.check_filter(wanted)


def test_probabilities_are_those_of_all_items_that_may_be_found(opened):
    states = torch.randn(4, opened.catalog.width, generator=torch.Generator().manual_seed(3))
    exclude = [[0, 5], [], list(range(16)), [1]]
    found, _ = opened.catalog.search(states, 16, exclude=exclude)
    for user, rows in zip(found, exclude, strict=True):
        assert len(user.ids) == 16 - len(rows)
        scores = torch.tensor(user.scores, dtype=torch.float64)
        expected = torch.log_softmax(scores, 0) if len(scores) else scores
        assert user.log_probs == pytest.approx(expected.tolist(), abs=2e-5)


def test_searches_see_one_version_while_writers_write(opened):
    """Every write gives all of a batch of items one title; a search may see one only."""
    names = [f"n{n}" for n in range(8)]
    given = [(n, {"title": "number 0"}) for n in names]
    rows = opened.catalog.encode(given)
    opened.catalog.put(given, rows)
    stop, wrong, versions = threading.Event(), [], set()

    def write():
        for number in range(1, 60):
            opened.catalog.put([(n, {"title": f"number {number}"}) for n in names], rows)
        stop.set()

    def read():
        while not stop.is_set():
            found, version = opened.catalog.search(
                torch.ones(1, opened.catalog.width), 30, exclude=[[]]
            )
            titles = {t for i, t in zip(found[0].ids, found[0].titles, strict=True) if i in names}
            versions.add(version)
            if titles != {f"number {version - 1}"} or len(found[0].ids) != 24:
                wrong.append((titles, version, len(found[0].ids)))

    threads = [threading.Thread(target=work) for work in (read, read, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(versions) > 5

"""Datasets on disk: whole or absent, the same bytes for the same data, damage is refused."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from _support.generated import generated_dataset

from r2ec_fast.data import IdMap, InteractionData, RecDataset, make_splits
from r2ec_fast.data.store import load_catalog, save_catalog


@pytest.fixture(scope="module")
def dataset() -> RecDataset:
    return generated_dataset(50)


def test_round_trip(dataset, tmp_path):
    dataset.save(tmp_path / "set")
    again = RecDataset.load(tmp_path / "set")
    for name in ("offsets", "item", "timestamp", "rating"):
        one, two = getattr(dataset.data, name), getattr(again.data, name)
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    assert again.data.users == dataset.data.users
    assert again.data.catalog.ids == dataset.data.catalog.ids
    assert again.data.catalog.fields.equals(dataset.data.catalog.fields)
    assert again.data.report.to_text() == dataset.data.report.to_text()
    assert again.settings == dataset.settings
    for split in ("train", "valid", "test"):
        np.testing.assert_array_equal(getattr(again, split).user, getattr(dataset, split).user)
        np.testing.assert_array_equal(
            getattr(again, split).position, getattr(dataset, split).position
        )


def test_no_times_no_ratings_integer_ids_empty_split(dataset, tmp_path):
    data = dataset.data
    bare = InteractionData(
        IdMap(range(data.num_users)), data.catalog, data.offsets, data.item, None, None, data.report
    )
    make_splits(bare, "leave_one_out").save(tmp_path / "set")
    again = RecDataset.load(tmp_path / "set")
    assert again.data.timestamp is None and again.data.rating is None
    assert again.data.users.ids[3] == 3
    assert again.history(0, 1).timestamps is None
    make_splits(data, fractions=(1.0, 0.0, 0.0)).save(tmp_path / "all")
    assert len(RecDataset.load(tmp_path / "all").test) == 0


def test_the_same_data_gives_the_same_bytes(dataset, tmp_path):
    for name in ("one", "two"):
        generated_dataset(50).save(tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == [
        "events.parquet", "examples.parquet", "items.parquet", "manifest.json", "users.parquet",
    ]  # fmt: skip
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["counts"]["events"] == dataset.data.num_events


def test_an_older_dataset_is_replaced_and_other_files_are_not(dataset, tmp_path):
    dataset.save(tmp_path / "set")
    generated_dataset(20).save(tmp_path / "set")
    assert RecDataset.load(tmp_path / "set").data.num_users == 20
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a dataset"):
        dataset.save(tmp_path / "mine")
    with pytest.raises(ValueError, match="is a file"):
        dataset.save(tmp_path / "mine" / "thesis.txt")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_save_leaves_the_old_dataset(dataset, tmp_path, monkeypatch):
    dataset.save(tmp_path / "set")

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("r2ec_fast.data.store._manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generated_dataset(20).save(tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert RecDataset.load(tmp_path / "set").data.num_users == 50


def test_damage_is_refused(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset here"):
        RecDataset.load(tmp_path)
    dataset.save(tmp_path / "set")
    events = tmp_path / "set" / "events.parquet"
    whole = events.read_bytes()
    events.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"damaged dataset, events\.parquet differs"):
        RecDataset.load(tmp_path / "set")
    events.unlink()
    with pytest.raises(ValueError, match=r"events\.parquet is missing"):
        RecDataset.load(tmp_path / "set")
    manifest = tmp_path / "set" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(ValueError, match="version 1, got 99"):
        RecDataset.load(tmp_path / "set")
    manifest.write_text("{")
    with pytest.raises(ValueError, match="not a readable manifest"):
        RecDataset.load(tmp_path / "set")
    manifest.write_text("{}")
    with pytest.raises(ValueError, match="another kind of manifest"):
        RecDataset.load(tmp_path / "set")


def test_mixed_ids_are_refused(dataset, tmp_path):
    data = dataset.data
    mixed = IdMap([0, *data.users.ids[1:]])
    bad = InteractionData(
        mixed, data.catalog, data.offsets, data.item, data.timestamp, data.rating, data.report
    )
    with pytest.raises(ValueError, match=r"user_id: only ids.*\['int', 'str'\]"):
        make_splits(bad).save(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, signal, sys
from r2ec_fast.quickstart.world import World
dataset = World(users=2000).dataset()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    dataset.save(sys.argv[1])
except OSError as error:
    sys.stdout.write(str(error))
"""


def test_a_full_disk_is_a_clear_error(tmp_path):
    """A limit on file size stands in for the disk: the write fails half way."""
    assert resource.RLIMIT_FSIZE is not None
    place = tmp_path / "set"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(place)], capture_output=True, text=True, timeout=120
    )
    assert "no space left to write" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_catalog_columns_of_any_type_survive(dataset, tmp_path):
    data = dataset.data
    fields = data.catalog.fields.with_columns(pl.Series("tags", [["a", "b"]] * data.num_items))
    richer = InteractionData(
        data.users, type(data.catalog)(data.catalog.ids, fields), data.offsets, data.item,
        data.timestamp, data.rating, data.report,
    )  # fmt: skip
    make_splits(richer).save(tmp_path / "set")
    assert RecDataset.load(tmp_path / "set").data.catalog.fields.equals(fields)


def test_a_catalog_that_others_wrote(dataset, tmp_path):
    """Read as it is, or refused by name: a model's catalog.parquet has no manifest."""
    catalog, path = dataset.data.catalog, tmp_path / "catalog.parquet"
    save_catalog(catalog, path)
    table, whole = pl.read_parquet(path), path.read_bytes()
    read = load_catalog(path)
    assert read.ids.ids == catalog.ids.ids and read.fields.equals(catalog.fields)
    missing = table.with_columns(
        item_id=pl.when(pl.int_range(pl.len()) != 1).then(pl.col("item_id"))
    )
    for other, words in (
        (table.drop("item_id"), "a column 'item_id' with an id for every item, got columns"),
        (missing, "a column 'item_id' with an id for every item, got 1 missing"),
        (table.drop("title"), "fields: expected a column 'title'"),
    ):
        other.write_parquet(path)
        with pytest.raises(ValueError, match=f"(?s)catalog.parquet: .*{words}"):
            load_catalog(path)
    for damaged in (whole[:-5], whole[:3], b"", b"item_id,title\n1,a\n"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"catalog.parquet: not a readable Parquet file"):
            load_catalog(path)

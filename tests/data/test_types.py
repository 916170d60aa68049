"""Id map, catalog, histories, exclusion lists."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_fast.data import (
    Catalog,
    Examples,
    History,
    IdMap,
    InteractionData,
    LoadReport,
    RecDataset,
    UnknownIdError,
    make_splits,
)


def small_data(times: bool = True) -> InteractionData:
    """Two users: items 0 1 2 1 and 3 0, a second apart."""
    catalog = Catalog(IdMap(["a", "b", "c", "d"]), pl.DataFrame({"title": ["A", "B", "C", "D"]}))
    return InteractionData(
        users=IdMap(["u", "v"]),
        catalog=catalog,
        offsets=np.array([0, 4, 6]),
        item=np.array([0, 1, 2, 1, 3, 0]),
        timestamp=np.array([10, 11, 12, 13, 5, 20]) if times else None,
        rating=np.array([5, np.nan, 3, 1, 4, 4], dtype=np.float32),
        report=LoadReport(),
    )


def test_times_of_the_events_to_predict():
    dataset = make_splits(small_data(), "leave_one_out")
    assert dataset.target_time(dataset.test).tolist() == [13, 20]
    bare = make_splits(small_data(times=False), "leave_one_out")
    assert bare.target_time(bare.test) is None


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(), st.integers()), unique=True))
def test_id_map_round_trip(ids):
    id_map = IdMap(ids)
    codes = id_map.encode(ids)
    assert codes.dtype == np.int64
    assert codes.tolist() == list(range(len(ids)))
    assert id_map.decode(codes) == ids


def test_id_map_names_the_unknown_id():
    with pytest.raises(UnknownIdError, match="'x'") as caught:
        IdMap(["a", "b"]).encode(["a", "x", "y"])
    assert isinstance(caught.value, KeyError)
    with pytest.raises(UnknownIdError, match="did you mean '7'"):
        IdMap(["7"]).encode([7])


def test_id_map_refuses_repeats_and_bad_internal_ids():
    with pytest.raises(ValueError, match="'a'"):
        IdMap(["a", "b", "a"])
    with pytest.raises(IndexError, match=r"0\.\.1, got -1"):
        IdMap(["a", "b"]).decode([-1])
    with pytest.raises(TypeError, match="sequence"):
        IdMap(["a", "b"]).encode("ab")


def test_catalog_needs_titles():
    ids = IdMap(["a", "b"])
    with pytest.raises(ValueError, match="'b'"):
        Catalog(ids, pl.DataFrame({"title": ["A", " "]}))
    with pytest.raises(ValueError, match="title"):
        Catalog(ids, pl.DataFrame({"name": ["A", "B"]}))
    with pytest.raises(ValueError, match="2"):
        Catalog(ids, pl.DataFrame({"title": ["A"]}))
    with pytest.raises(TypeError, match="title"):
        Catalog(ids, pl.DataFrame({"title": [1, 2]}))


def test_history_holds_the_window_before_the_position():
    dataset = make_splits(small_data())
    history = dataset.history(0, 3, window=2)
    assert isinstance(history, History)
    assert history.items.tolist() == [1, 2]
    assert history.timestamps.tolist() == [11, 12]
    assert history.target_time == 13
    everything = dataset.history(0, 4)
    assert everything.items.tolist() == [0, 1, 2, 1]
    assert everything.target_time is None
    for position in (0, 5):
        with pytest.raises(IndexError, match=r"1\.\.4"):
            dataset.history(0, position)


def test_exclude_is_every_earlier_event():
    dataset = make_splits(small_data(), "leave_one_out")
    examples = Examples(np.array([0, 1, 0]), np.array([3, 1, 1]))
    values, offsets = dataset.exclude(examples)
    assert values.tolist() == [0, 1, 2, 3, 0]
    assert offsets.tolist() == [0, 3, 4, 5]
    values, offsets = dataset.exclude(examples, window=1)
    assert values.tolist() == [2, 3, 0]
    assert offsets.tolist() == [0, 1, 2, 3]
    assert dataset.target(examples).tolist() == [1, 0, 1]
    empty = Examples(np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    values, offsets = dataset.exclude(empty)
    assert values.tolist() == [] and offsets.tolist() == [0]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.data())
def test_exclude_equals_the_plain_loop(lengths, window, draw):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    item = np.array(
        draw.draw(st.lists(st.integers(0, 3), min_size=sum(lengths), max_size=sum(lengths))),
        dtype=np.int64,
    )
    base = small_data()
    data = InteractionData(
        IdMap(range(len(lengths))), base.catalog, offsets, item, None, None, LoadReport()
    )
    dataset = make_splits(data, "leave_one_out")
    for part in (dataset.train, dataset.valid, dataset.test):
        for shown in (None, window):
            values, bounds = dataset.exclude(part, shown)
            for i, (u, p) in enumerate(zip(part.user, part.position, strict=True)):
                expected = item[offsets[u] : offsets[u] + p].tolist()
                expected = expected if shown is None else expected[-shown:]
                assert values[bounds[i] : bounds[i + 1]].tolist() == expected


def test_interaction_data_checks_its_arrays():
    good = small_data()
    with pytest.raises(ValueError, match="offsets"):
        InteractionData(
            good.users, good.catalog, np.array([0, 6]), good.item, None, None, LoadReport()
        )
    with pytest.raises(ValueError, match=r"item.*0\.\.3"):
        InteractionData(
            good.users, good.catalog, good.offsets, good.item + 1, None, None, LoadReport()
        )
    with pytest.raises(ValueError, match="rating"):
        InteractionData(
            good.users, good.catalog, good.offsets, good.item, None, good.rating[:2], LoadReport()
        )
    with pytest.raises(ValueError, match="timestamps"):
        History(np.array([1, 2]), timestamps=np.array([1]))
    with pytest.raises(ValueError, match="one length"):
        Examples(np.array([1]), np.array([1, 2]))


def test_report_counts_and_prints():
    report = LoadReport("file.csv")
    report.add("bad row", 2, "dropped", "no id")
    report.add("bad row", 3, "dropped", "no id")
    report.add("fine", 0, "kept", "nothing")
    report.add_stage("reading", 1200, 30, 4)
    text = report.to_text()
    assert report.count("bad row") == 5 and report.count("never ran") == 0
    assert "bad row      5  dropped  no id" in text
    assert "1,200" in text and "1 further checks found nothing" in text
    assert LoadReport.from_dict(report.to_dict()).to_text() == text
    with pytest.raises(ValueError, match="action"):
        report.add("x", 1, "lost", "y")


def test_dataset_settings_default_is_not_shared():
    data = small_data()
    nothing = Examples(np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    one, two = (RecDataset(data, nothing, nothing, nothing) for _ in range(2))
    one.settings["a"] = 1
    assert two.settings == {}

"""Splits against a plain loop, sizes of the paper's table, refusals."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from _support.plain_data import plain_time_split
from hypothesis import given, settings
from hypothesis import strategies as st

from r2ec_fast.data import Catalog, IdMap, InteractionData, LoadReport, make_splits


def data_of(times_by_user: list[list[int]]) -> InteractionData:
    lengths = [len(t) for t in times_by_user]
    total = sum(lengths)
    return InteractionData(
        users=IdMap([f"u{i}" for i in range(len(lengths))]),
        catalog=Catalog(IdMap(["a"]), pl.DataFrame({"title": ["A"]})),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        item=np.zeros(total, dtype=np.int64),
        timestamp=np.array([t for times in times_by_user for t in sorted(times)], dtype=np.int64),
        rating=None,
        report=LoadReport(),
    )


def pairs(examples) -> list[tuple[int, int]]:
    return list(zip(examples.user.tolist(), examples.position.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=7), min_size=1, max_size=8))
def test_time_split_equals_the_plain_loop(times):
    data = data_of(times)
    dataset = make_splits(data)
    expected = plain_time_split([sorted(t) for t in times])
    assert [pairs(dataset.train), pairs(dataset.valid), pairs(dataset.test)] == expected


@pytest.mark.parametrize(
    "total, sizes",
    [
        (34_373, (27_498, 3_437, 3_438)),
        (13_435, (10_748, 1_343, 1_344)),
        (63_502, (50_801, 6_350, 6_351)),
    ],
)
def test_time_split_sizes_are_the_papers(total, sizes):
    dataset = make_splits(data_of([list(range(total + 1))]))
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == sizes


def test_fractions_are_exact_decimals():
    # 0.7 + 0.1 < 0.8 in binary; ten examples must still be cut at 7 and 8.
    dataset = make_splits(data_of([list(range(11))]), fractions=(0.7, 0.1, 0.2))
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (7, 1, 2)


def test_no_training_target_is_later_than_a_test_target():
    rng = np.random.default_rng(0)
    data = data_of([rng.integers(0, 1000, n).tolist() for n in rng.integers(1, 20, 50)])
    for dataset in (
        make_splits(data),
        make_splits(data, "time_cut", valid_from=600, test_from=800),
    ):
        time = [
            data.timestamp[data.offsets[p.user] + p.position]
            for p in (dataset.train, dataset.valid, dataset.test)
        ]
        assert time[0].max() <= time[1].min() and time[1].max() <= time[2].min()
        total = sum(len(t) for t in time)
        assert total == data.num_events - data.num_users


def test_time_cut_puts_the_bound_into_the_later_part():
    data = data_of([[0, 10, 20, 30, 40]])
    dataset = make_splits(data, "time_cut", valid_from=20, test_from=40)
    assert pairs(dataset.train) == [(0, 1)]
    assert pairs(dataset.valid) == [(0, 2), (0, 3)]
    assert pairs(dataset.test) == [(0, 4)]
    again = make_splits(
        data, "time_cut", valid_from="1970-01-01T00:00:20", test_from="1970-01-01 00:00:40Z"
    )
    assert pairs(again.test) == pairs(dataset.test)
    assert again.settings["valid_from"] == 20


def test_leave_one_out():
    dataset = make_splits(data_of([[0, 1, 2, 3], [5, 6], [9]]), "leave_one_out")
    assert pairs(dataset.test) == [(0, 3), (1, 1)]
    assert pairs(dataset.valid) == [(0, 2)]
    assert pairs(dataset.train) == [(0, 1)]


def test_refusals():
    data = data_of([[0, 1, 2]])
    without = InteractionData(
        data.users, data.catalog, data.offsets, data.item, None, None, LoadReport()
    )
    with pytest.raises(ValueError, match="needs timestamps.*leave_one_out"):
        make_splits(without)
    with pytest.raises(ValueError, match="method: expected one of"):
        make_splits(data, "random")
    with pytest.raises(ValueError, match="add up to 1"):
        make_splits(data, fractions=(0.8, 0.1, 0.2))
    with pytest.raises(ValueError, match="both are needed"):
        make_splits(data, "time_cut", valid_from=3)
    with pytest.raises(ValueError, match="not after test_from"):
        make_splits(data, "time_cut", valid_from=3, test_from=2)
    with pytest.raises(ValueError, match="valid_from: expected unix seconds"):
        make_splits(data, "time_cut", valid_from="soon", test_from=2)
    with pytest.raises(ValueError, match="only for method 'time_cut'"):
        make_splits(data, "time", test_from=2)

"""The window's start moves back as calendars do, and the check that it stops."""

from __future__ import annotations

import datetime as dt

import numpy as np
import polars as pl
import pytest

from r2ec_fast.data import load_interactions
from r2ec_fast.data.build import CodedEvents
from r2ec_fast.data.prepare import prepare_generic, prepare_movielens
from r2ec_fast.data.report import LoadReport
from r2ec_fast.data.settings import EventRules
from r2ec_fast.data.window import cut_window


def ms(day: str) -> int:
    return int(dt.datetime.fromisoformat(day).replace(tzinfo=dt.UTC).timestamp() * 1000)


def events_at(days: list[str]) -> CodedEvents:
    """One event of user 0 with a new item on each day."""
    n = len(days)
    return CodedEvents(
        user_ids=pl.Series(["u"]),
        item_ids=pl.Series([f"i{k:02d}" for k in range(n)]),
        user=np.zeros(n, dtype=np.uint32),
        item=np.arange(n, dtype=np.uint32),
        time=np.array([ms(day) for day in days]),
        rating=np.full(n, np.nan, dtype=np.float32),
        has_time=True,
        has_rating=False,
    )


DAYS = ["2019-06-01", "2021-01-01", "2022-02-28", "2022-04-30", "2022-07-31", "2022-12-01"]


@pytest.mark.parametrize(
    "min_items, start, left",
    [
        (0, "2022-10-01", 1),
        (1, "2022-10-01", 1),
        (2, "2022-07-01", 2),
        (3, "2022-04-01", 3),
        (4, "2022-01-01", 4),
        (5, "2021-01-01", 5),
        (6, "2019-10-01", 5),  # stops in the first year of the data, as the reference does
    ],
)
def test_rollback(min_items, start, left):
    events, report = events_at(DAYS), LoadReport()
    first = cut_window(
        events, report, EventRules(start="2022-10-01", end="2023-10-01", min_items=min_items)
    )
    assert first * 1000 == ms(start)
    assert len(events.user) == left


def test_ends_of_months():
    events = events_at(["2020-01-01", *DAYS[1:]])
    first = cut_window(events, LoadReport(), EventRules(start="2022-05-31", min_items=4))
    assert first * 1000 == ms("2022-02-28")


def test_bounds_are_half_open_and_counted():
    events, report = events_at(DAYS), LoadReport()
    cut_window(events, report, EventRules(start="2021-01-01", end="2022-07-31"))
    assert events.item.tolist() == [1, 2, 3]
    assert report.count("event before the window's start") == 1
    assert report.count("event at or after the window's end") == 2
    events = events_at(DAYS)
    assert cut_window(events, LoadReport(), EventRules()) is None
    assert len(events.user) == 6


def test_core_inside_the_window(write):
    rows = ["u,a,1", "v,a,2", "u,b,3", "v,b,4", "w,a,5", "u,c,6", "u,a,100", "v,c,100"]
    log = write("log.csv", "user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    data = load_interactions(log, start="0", end="50", k_core=2)
    assert data.users.ids == ("u", "v") and data.num_events == 4
    assert data.report.count("event outside the window's 2-core") == 2
    assert data.catalog.ids.ids == ("a", "b")
    full = load_interactions(log, start="0", end="50", k_core=2, keep_unused_items=True)
    assert full.catalog.ids.ids == ("a", "b", "c")
    plain = load_interactions(log, start="0", end="50")
    assert plain.catalog.ids.ids == ("a", "b", "c")


def test_refusals(write):
    events = events_at(DAYS)
    with pytest.raises(ValueError, match="start: expected a time before end"):
        cut_window(events, LoadReport(), EventRules(start="2022-01-01", end="2021-01-01"))
    with pytest.raises(ValueError, match=r"no event of 6 is in \['2030-01-01', None\)"):
        cut_window(events_at(DAYS), LoadReport(), EventRules(start="2030-01-01"))
    log = write("log.csv", "user_id,item_id\na,1\na,2\n")
    with pytest.raises(ValueError, match="needs timestamps"):
        load_interactions(log, start="2020-01-01")


def test_prepare_movielens(write, tmp_path):
    rows = "".join(
        f"{u},{m},{1 + (u + m) % 5},{1000 * m + u}\n" for u in range(8) for m in range(9)
    )
    write("ml/ratings.csv", "userId,movieId,rating,timestamp\n" + rows)
    write("ml/movies.csv", "movieId,title,genres\n" + "".join(f"{m},M{m},War\n" for m in range(10)))
    done = prepare_movielens(str(tmp_path / "ml"), str(tmp_path / "set"), min_rating=3, k_core=3)
    data = done.dataset.data
    assert (data.rating >= 3).all() and np.diff(data.offsets).min() >= 3
    assert done.dataset.settings["prompt"]["category_singular"] == "movie"
    assert done.dataset.settings["layout"] == "csv"
    assert "event under the rating threshold" in done.report
    assert (tmp_path / "set" / "report.txt").read_text() == done.report + "\n"


def test_prepare_generic_chooses_the_split_by_the_times(write, tmp_path):
    with_times = write("a.csv", "user_id,item_id,timestamp\na,1,1\na,2,2\na,3,3\n")
    without = write("b.csv", "user_id,item_id\na,1\na,2\na,3\n")
    one = prepare_generic(str(with_times), str(tmp_path / "one")).dataset
    two = prepare_generic(str(without), str(tmp_path / "two")).dataset
    assert one.settings["split"] == "time" and two.settings["split"] == "leave_one_out"
    assert two.settings["rules"]["rating_range"] == [0.0, None]
    assert len(one.settings["sources"]) == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(ValueError, match="not a dataset"):
        prepare_generic(str(with_times), str(tmp_path / "full"))


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["movielens", "giftcards", "beauty"])
def test_real_data_through_prepare(real_data, tmp_path, name):
    out = str(tmp_path / "set")
    gift, beauty = real_data / "amazon-giftcards-5core", real_data / "amazon-beauty-5core"
    if name == "movielens":
        done = prepare_movielens(str(real_data / "ml-latest-small"), out)
    elif name == "giftcards":
        done = prepare_generic(str(gift / "interactions.csv"), out, items=str(gift / "items.csv"))
    else:
        done = prepare_generic(str(beauty / "sequences.txt"), out, items=str(beauty / "items.tsv"))
    sizes = [len(getattr(done.dataset, part)) for part in ("train", "valid", "test")]
    assert (
        sizes
        == {
            "movielens": [80_180, 10_023, 10_023],
            "giftcards": [2_008, 251, 252],
            "beauty": [131_282, 22_363, 22_363],
        }[name]
    )
    assert (tmp_path / "set" / "report.png").stat().st_size > 10_000

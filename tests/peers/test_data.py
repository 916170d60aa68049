"""Interactions that pandas, pyarrow, RecBole and RecTools write, read and split, against ours."""

import decimal

import numpy as np
import polars as pl
import pytest

from r2ec_fast import load_interactions
from r2ec_fast.data import RecDataset, make_splits

pytestmark = pytest.mark.peers

EVENTS, USERS, ITEMS, CORE = 900, 60, 40, 8


@pytest.fixture(scope="module")
def pd():
    return pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def frame(pd):
    """Users of very different activity, no two events at one time."""
    rng = np.random.default_rng(0)
    user = (USERS * rng.random(EVENTS) ** 2).astype(int)
    item = (ITEMS * rng.random(EVENTS) ** 2).astype(int)
    return pd.DataFrame(
        {
            "user_id": [f"u{i}" for i in user],
            "item_id": [f"i{i}" for i in item],
            "rating": rng.integers(1, 6, EVENTS).astype(float),
            "timestamp": 1_600_000_000 + 3600 * rng.permutation(EVENTS),
        }
    )


def with_time(pd, frame, zone: str | None):
    times = pd.to_datetime(frame.timestamp, unit="s")
    if zone:
        times = times.dt.tz_localize("UTC").dt.tz_convert(zone)
    return frame.assign(timestamp=times)


# how a notebook may have left the same table
FRAMES = {
    "plain": lambda pd, f: f,
    "shuffled, with its index": lambda pd, f: f.sample(frac=1, random_state=0),
    "category": lambda pd, f: f.astype({"user_id": "category", "item_id": "category"}),
    "nullable": lambda pd, f: f.astype({"rating": "Float32", "timestamp": "Int64"}),
    "small integers": lambda pd, f: f.astype({"rating": "int8"}),
    "users as the index": lambda pd, f: f.set_index("user_id"),
    "datetime": lambda pd, f: with_time(pd, f, None),
    "datetime in Tokyo": lambda pd, f: with_time(pd, f, "Asia/Tokyo"),
    "decimals": lambda pd, f: f.assign(rating=[decimal.Decimal(int(r)) for r in f.rating]),
    "ids as bytes": lambda pd, f: f.assign(user_id=f.user_id.str.encode("utf8")),
}
PARQUET = {
    "version 1, small groups": {"version": "1.0", "row_group_size": 37, "use_dictionary": False},
    "pages of version 2": {"data_page_version": "2.0", "compression": "zstd"},
    "brotli": {"compression": "brotli"},
}


def assert_same(data, frame) -> None:
    """Every event of the table, a user's oldest first."""
    expected = frame.sort_values(["user_id", "timestamp"])
    users = np.repeat(np.array(data.users.ids), np.diff(data.offsets))
    assert users.tolist() == expected.user_id.tolist()
    assert [data.catalog.ids.ids[i] for i in data.item] == expected.item_id.tolist()
    assert data.timestamp.tolist() == expected.timestamp.tolist()
    assert data.rating.tolist() == expected.rating.tolist()


@pytest.mark.parametrize("kind", FRAMES)
def test_parquet_of_pandas(pd, frame, tmp_path, kind):
    FRAMES[kind](pd, frame).to_parquet(tmp_path / "events.parquet")
    assert_same(load_interactions(tmp_path / "events.parquet"), frame)


@pytest.mark.parametrize("kind", PARQUET)
def test_parquet_of_pyarrow(frame, tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pandas(frame), tmp_path / "events.parquet", **PARQUET[kind])
    assert_same(load_interactions(tmp_path / "events.parquet"), frame)


@pytest.mark.parametrize("name", ["events.csv", "events.csv.gz", "events.tsv", "events.jsonl"])
def test_text_of_pandas(frame, tmp_path, name):
    path = tmp_path / name
    if "json" in name:
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, sep="\t" if "tsv" in name else ",")
    assert_same(load_interactions(path), frame)


def test_a_prepared_directory_in_pyarrow(frame, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pl.DataFrame({name: frame[name].to_numpy() for name in frame}).write_csv(tmp_path / "e.csv")
    data = load_interactions(tmp_path / "e.csv")
    make_splits(data).save(tmp_path / "prepared")
    table = {
        name: pq.read_table(tmp_path / "prepared" / f"{name}.parquet").to_pydict()
        for name in ("users", "items", "events", "examples")
    }
    assert table["users"]["user_id"] == list(data.users.ids)
    assert table["items"]["item_id"] == list(data.catalog.ids.ids)
    assert table["events"]["item"] == data.item.tolist()
    assert table["events"]["timestamp"] == data.timestamp.tolist()
    read = RecDataset.load(tmp_path / "prepared")
    assert table["examples"]["split"].count(2) == len(read.test)


def write_recbole(frame, folder) -> None:
    columns = {"user_id": "token", "item_id": "token", "rating": "float", "timestamp": "float"}
    folder.mkdir()
    named = frame.rename(columns={name: f"{name}:{kind}" for name, kind in columns.items()})
    named.to_csv(folder / "toy.inter", sep="\t", index=False)


def recbole_targets(folder, core: int) -> tuple[int, int, dict, dict]:
    """(users, items, user -> test item, user -> set of what is left out) of RecBole."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation

    at_least = f"[{core},inf)"
    config = Config(
        model="BPR",
        dataset="toy",
        config_dict={
            "data_path": str(folder),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "user_inter_num_interval": at_least,
            "item_inter_num_interval": at_least,
            "rm_dup_inter": "first",
            "use_gpu": False,
            "eval_args": {
                "split": {"LS": "valid_and_test"},
                "group_by": "user",
                "order": "TO",
                "mode": "full",
            },
        },
    )
    dataset = create_dataset(config)
    _, _, test = data_preparation(config, dataset)
    targets, seen = {}, {}
    for users, (rows, history), of, items in test:
        names = dataset.id2token("user_id", users["user_id"])
        for row, item in zip(of.tolist(), items, strict=True):
            targets[names[row]] = dataset.id2token("item_id", int(item))
        for row, name in enumerate(names):
            seen[name] = set(dataset.id2token("item_id", history[rows == row]))
    return dataset.user_num - 1, dataset.item_num - 1, targets, seen


@pytest.mark.parametrize("core", [0, CORE])
def test_recbole_reads_filters_and_splits_the_same(frame, tmp_path, monkeypatch, core):
    """The atomic file, the k-core, the last event of each user, and what a user has seen."""
    pytest.importorskip("recbole")
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        pytest.skip("RecBole 1.2.1 needs numpy < 2 (np.float_)")
    monkeypatch.chdir(tmp_path)
    write_recbole(frame, tmp_path / "toy")
    users, items, targets, seen = recbole_targets(tmp_path, core)
    data = load_interactions(tmp_path / "toy" / "toy.inter", k_core=core, repeats="first")
    dataset = make_splits(data, "leave_one_out")
    assert (len(data.users), len(data.catalog)) == (users, items)
    assert core == 0 or 0 < users < len(set(frame.user_id))
    names, titles = data.users.ids, data.catalog.ids.ids
    last = zip(dataset.test.user, dataset.target(dataset.test), strict=True)
    ours = {names[user]: titles[item] for user, item in last}
    assert {user: targets[user] for user in ours} == ours
    for user, position in zip(dataset.test.user, dataset.test.position, strict=True):
        first = data.offsets[user]
        assert {titles[i] for i in data.item[first : first + position]} == seen[names[user]]


def test_rectools_keeps_the_same_last_events(pd, frame, tmp_path):
    pytest.importorskip("rectools")
    from rectools import Columns
    from rectools.dataset import Interactions
    from rectools.model_selection import LastNSplitter

    frame.to_csv(tmp_path / "events.csv", index=False)
    data = load_interactions(tmp_path / "events.csv")
    dataset = make_splits(data, "leave_one_out")
    code = {name: row for row, name in enumerate(data.users.ids)}
    item = {name: row for row, name in enumerate(data.catalog.ids.ids)}
    theirs = pd.DataFrame(
        {
            Columns.User: frame.user_id.map(code),
            Columns.Item: frame.item_id.map(item),
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(frame.timestamp, unit="s"),
        }
    )
    splitter = LastNSplitter(
        1, filter_cold_items=False, filter_cold_users=False, filter_already_seen=False
    )
    [(_, test, _)] = splitter.split(Interactions(theirs))
    last = theirs.iloc[test].set_index(Columns.User)[Columns.Item]
    ours = dict(zip(dataset.test.user.tolist(), dataset.target(dataset.test).tolist(), strict=True))
    assert {user: int(last[user]) for user in ours} == ours and len(ours) > USERS / 2

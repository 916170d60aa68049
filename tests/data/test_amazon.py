"""Amazon Reviews 2023: the paper's rules against a slow plain version, determinism, leakage."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from _support.plain_data import plain_amazon, plain_time_split
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from r2ec_fast.data import RecDataset, make_splits
from r2ec_fast.data.prepare import check_amazon, prepare_amazon
from r2ec_fast.data.sources.amazon import AmazonRules, load_amazon
from r2ec_fast.prompts.builder import PromptBuilder

WINDOW = {"start": "2022-10-01", "end": "2023-10-01", "min_items": 150}
DATA_FILES = ("users.parquet", "items.parquet", "events.parquet", "examples.parquet")


@pytest.fixture(scope="module")
def files(tmp_path_factory, generate_amazon):
    return generate_amazon(tmp_path_factory.mktemp("raw"), reviews=10_000)


@pytest.fixture(scope="module")
def prepared(files, tmp_path_factory):
    place = tmp_path_factory.mktemp("out") / "set"
    return prepare_amazon(
        str(place), reviews=str(files[0]), metadata=str(files[1]), progress=False, **WINDOW
    )


def events_of(dataset: RecDataset) -> dict[str, list[tuple[str, int, float | None]]]:
    data = dataset.data
    out = {}
    for u, user in enumerate(data.users.ids):
        a, b = data.offsets[u], data.offsets[u + 1]
        ratings = [None if np.isnan(r) else r for r in data.rating[a:b].tolist()]
        items = data.catalog.ids.decode(data.item[a:b])
        out[user] = list(zip(items, data.timestamp[a:b].tolist(), ratings, strict=True))
    return out


@pytest.mark.parametrize("min_items", [0, 150, 178, 10_000])
def test_equals_the_plain_version(files, tmp_path, min_items):
    window = {**WINDOW, "min_items": min_items}
    users, items = plain_amazon(*files, **window)
    dataset = make_splits(load_amazon(*files, tmp_path, AmazonRules(**window)).data)
    assert events_of(dataset) == {
        user: [(item, ms // 1000, rating) for item, ms, rating in events]
        for user, events in users.items()
    }
    catalog = dict(
        zip(dataset.data.catalog.ids.ids, dataset.data.catalog.fields.rows(named=True), strict=True)
    )
    assert {item: row["title"] for item, row in catalog.items()} == {
        item: row["title"] for item, row in items.items()
    }
    assert catalog == items
    times = [[ms // 1000 for _, ms, _ in users[user]] for user in dataset.data.users.ids]
    pairs = [
        list(zip(p.user.tolist(), p.position.tolist(), strict=True))
        for p in (dataset.train, dataset.valid, dataset.test)
    ]
    assert pairs == plain_time_split(times)


def test_two_runs_give_the_same_bytes(prepared, files, tmp_path):
    prepare_amazon(
        str(tmp_path / "again"),
        reviews=str(files[0]),
        metadata=str(files[1]),
        progress=False,
        **WINDOW,
    )
    names = sorted(p.name for p in prepared.directory.iterdir())
    assert names == sorted([*DATA_FILES, "manifest.json", "report.txt", "report.png"])
    for name in names:
        one, two = prepared.directory / name, tmp_path / "again" / name
        assert one.read_bytes() == two.read_bytes(), name
    assert (prepared.directory / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_shuffled_rows_give_the_same_output(prepared, files, tmp_path):
    shuffled = []
    for path in files:
        lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
        random.Random(1).shuffle(lines)
        shuffled.append(tmp_path / path.name)
        shuffled[-1].write_bytes(gzip.compress(b"".join(lines)))
    out = tmp_path / "set"
    prepare_amazon(
        str(out), reviews=str(shuffled[0]), metadata=str(shuffled[1]), progress=False, **WINDOW
    )
    for name in (*DATA_FILES, "report.txt", "report.png"):
        assert (out / name).read_bytes() == (prepared.directory / name).read_bytes(), name
    # The manifests differ in the hashes and sizes of the sources alone.
    one, two = (json.loads((d / "manifest.json").read_text()) for d in (out, prepared.directory))
    for manifest in (one, two):
        for source in manifest["settings"]["sources"]:
            source.pop("sha256")
            source.pop("bytes")
    assert one == two


def test_benchmark_csv_of_the_same_events_gives_the_same_data(prepared, files, tmp_path):
    """A rating_only file, cut to its 5-core by the plain version, equals the raw reviews."""
    everything, _ = plain_amazon(*files, start="1971-01-01", end="2099-01-01", min_items=0)
    items = {row["parent_asin"]: row for row in _records(files[1])}
    assert items
    lines = ["user_id,parent_asin,rating,timestamp"]
    for user, events in everything.items():
        for item, ms, rating in events:
            lines.append(f"{user},{item},{'' if rating is None else rating},{ms}")
    path = tmp_path / "Generated.csv.gz"
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    dataset = make_splits(load_amazon(path, files[1], tmp_path, AmazonRules(**WINDOW)).data)
    assert events_of(dataset) == events_of(prepared.dataset)
    assert "5-core over all time" not in dataset.data.report.to_text()
    raw = load_amazon(*files, tmp_path, AmazonRules(history_k_core=0, **WINDOW)).data
    assert "5-core over all time" in prepared.report and raw.num_events > dataset.data.num_events


def _records(path):
    out = []
    for line in gzip.decompress(path.read_bytes()).splitlines():
        try:
            out.append(json.loads(line.decode("utf8", errors="replace")))
        except ValueError:
            continue
    return out


def test_no_training_example_knows_the_test_time(prepared):
    dataset = prepared.dataset
    data = dataset.data
    cut = [
        data.timestamp[data.offsets[part.user] + part.position]
        for part in (dataset.train, dataset.valid, dataset.test)
    ]
    assert cut[0].max() <= cut[1].min() <= cut[1].max() <= cut[2].min()
    for part in (dataset.train, dataset.valid, dataset.test):
        for user, position in zip(part.user.tolist(), part.position.tolist(), strict=True):
            history = dataset.history(user, position, window=20)
            assert history.timestamps.max() <= history.target_time
            own = data.item[data.offsets[user] : data.offsets[user] + position]
            assert history.items.tolist() == own[-20:].tolist()
    # The paper's item statistics are the catalog's: the report must say so.
    assert "may know ratings of the test time, as in the paper" in prepared.report


def test_no_prompt_of_a_training_example_knows_the_test_time(prepared):
    """Replace every event after the last training target: no training prompt moves."""
    dataset, data = prepared.dataset, prepared.dataset.data
    train = dataset.train
    last = data.timestamp[data.offsets[train.user] + train.position].max()
    later = data.timestamp > last
    assert later.any()
    changed = replace(
        data,
        item=np.where(later, (data.item + 1) % data.num_items, data.item),
        rating=np.where(later, np.float32(1), data.rating),
    )
    other = RecDataset(changed, train, dataset.valid, dataset.test)
    words = {"[UNK]": 0, "<answer>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]"
    )
    builder = PromptBuilder(tokenizer, data.catalog)
    titles = data.catalog.titles
    targets = dataset.target(train)
    for i in range(0, len(train), 7):
        user, position = int(train.user[i]), int(train.position[i])
        prompt = builder.user_text(dataset.history(user, position, 20))
        assert prompt == builder.user_text(other.history(user, position, 20))
        # A user has each item once, and titles are distinct: the target must not be shown.
        assert f"[{titles[targets[i]]}]" not in prompt
        assert f"[{titles[dataset.history(user, position).items[-1]]}]" in prompt


def test_item_statistics_of_the_window_start_know_nothing_later(files, tmp_path):
    """Change every rating inside the window: the item text must not move."""
    texts = []
    for name, change in (("as it is", False), ("changed", True)):
        reviews = tmp_path / name / "Generated.jsonl.gz"
        reviews.parent.mkdir()
        lines = []
        for row in _records(files[0]):
            stamp = row["timestamp"]
            if change and isinstance(stamp, int) and stamp >= 1_664_582_400_000:
                row["rating"] = 1.0
            lines.append(json.dumps(row))
        reviews.write_bytes(gzip.compress("\n".join(lines).encode()))
        rules = AmazonRules(item_statistics="window_start", **WINDOW)
        loaded = load_amazon(reviews, files[1], reviews.parent, rules)
        texts.append(loaded.data.catalog.fields)
        assert loaded.start == 1_664_582_400
    assert texts[0].equals(texts[1])
    before: dict[str, list[float]] = {}
    everything, _ = plain_amazon(*files, start="1971-01-01", end="2022-10-01", min_items=0)
    for events in everything.values():
        for item, _, rating in events:
            if rating is not None:
                before.setdefault(item, []).append(rating)
    fields = texts[0].with_columns(item=np.array(loaded.data.catalog.ids.ids))
    assert fields.height > 100
    for row in fields.rows(named=True):
        ratings = before.get(row["item"], [])
        assert row["rating_number"] == len(ratings)
        if ratings:
            assert row["average_rating"] == pytest.approx(np.mean(ratings), abs=0.0501)
        else:
            assert row["average_rating"] is None


def test_statistics_can_be_left_out(files, tmp_path):
    rules = AmazonRules(item_statistics="none", **WINDOW)
    fields = load_amazon(*files, tmp_path, rules).data.catalog.fields
    assert fields.columns == ["title", "description"]


def test_manifest_holds_settings_counts_and_sources(prepared, files):
    manifest = json.loads((prepared.directory / "manifest.json").read_text())
    settings = manifest["settings"]
    assert settings["rules"]["max_title_words"] == 20
    assert settings["rules"]["min_items"] == 150
    assert settings["prompt"] == {
        "category": "musical instruments",
        "category_singular": "musical instrument",
    }
    for source, path in zip(settings["sources"], files, strict=True):
        assert source["name"] == path.name and source["bytes"] == path.stat().st_size
    stages = [stage["stage"] for stage in manifest["report"]["stages"]]
    assert stages[:4] == [
        "reading",
        "duplicates and rating rules",
        "5-core over all time",
        "item rules",
    ]
    assert str(prepared.directory) not in json.dumps(manifest)


def test_check_compares_with_the_papers_table(prepared, tmp_path, monkeypatch):
    check = check_amazon(str(prepared.directory))
    assert not check.matches and "does NOT agree" in check.text
    assert "min_items=150" in check.text
    counts = json.loads((prepared.directory / "manifest.json").read_text())["counts"]
    row = tuple(counts[name] for name in ("users", "items", "train", "valid", "test"))
    monkeypatch.setattr("r2ec_fast.data.prepare.PAPER", {"Musical_Instruments": row})
    assert check_amazon(str(prepared.directory)).matches
    monkeypatch.setattr("r2ec_fast.data.prepare.PAPER", {"Video_Games": row})
    with pytest.raises(ValueError, match="the paper has Video_Games"):
        check_amazon(str(prepared.directory))


def test_category_words(files, tmp_path, caplog):
    out = prepare_amazon(
        str(tmp_path / "set"),
        category="Pet_Supplies",
        reviews=str(files[0]),
        metadata=str(files[1]),
        progress=False,
        **WINDOW,
    )
    assert out.dataset.settings["prompt"] == {
        "category": "pet supplies",
        "category_singular": "pet supply",
    }
    assert "no words for category 'Pet_Supplies'" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"category": "Instruments"}, "no category of Amazon Reviews 2023"),
        ({"start": "2024-01-01"}, "start: expected a time before end"),
        ({"start": "soon"}, "start: expected unix seconds or ISO"),
        ({"end": "2001-01-01", "start": "2000-01-01"}, "end: none of the .* events is before"),
        ({"item_statistics": "all"}, "item_statistics: expected one of"),
        ({"rollback_months": 0}, "rollback_months: expected >= 1"),
        ({"k_core": 1_000}, "no event of"),
        ({"words": ("one",)}, "words: expected"),
    ],
)
def test_refusals(files, tmp_path, settings, message):
    paths = {"reviews": str(files[0]), "metadata": str(files[1])}
    if "category" in settings:
        paths.pop("metadata")
    with pytest.raises(ValueError, match=message):
        prepare_amazon(str(tmp_path / "set"), progress=False, **{**WINDOW, **paths, **settings})
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_another_category_is_refused(files, tmp_path):
    other = tmp_path / "meta.jsonl"
    other.write_text('{"parent_asin": "B000000000", "title": "T", "price": 1.0}\n')
    with pytest.raises(ValueError, match="no event's item has usable metadata"):
        prepare_amazon(
            str(tmp_path / "set"), reviews=str(files[0]), metadata=str(other), progress=False
        )
    with pytest.raises(ValueError, match="metadata: .* has no column for 'price'"):
        other.write_text('{"parent_asin": "B000000000", "title": "T"}\n')
        prepare_amazon(
            str(tmp_path / "set"), reviews=str(files[0]), metadata=str(other), progress=False
        )
    assert [p.name for p in tmp_path.iterdir()] == ["meta.jsonl"]

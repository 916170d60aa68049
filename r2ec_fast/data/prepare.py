"""Source files -> a dataset directory: Parquet tables, manifest.json, report.txt, report.png."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from r2ec_fast.data.categories import category_words
from r2ec_fast.data.sources.amazon import AMAZON_URL, AmazonRules, amazon_urls, load_amazon
from r2ec_fast.data.sources.download import download
from r2ec_fast.data.sources.generic import load_interactions
from r2ec_fast.data.sources.movielens import find_movielens
from r2ec_fast.data.splits import make_splits
from r2ec_fast.data.store import (
    file_sha256,
    read_manifest,
    refuse_foreign,
    save_dataset,
    write_errors,
)
from r2ec_fast.data.summary import summary_png, summary_text
from r2ec_fast.data.types import RecDataset

# users, items, train, valid, test of the paper's table
PAPER: dict[str, tuple[int, int, int, int, int]] = {
    "Musical_Instruments": (15_656, 10_320, 27_498, 3_437, 3_438),
    "CDs_and_Vinyl": (7_701, 12_024, 10_748, 1_343, 1_344),
    "Video_Games": (29_230, 10_144, 50_801, 6_350, 6_351),
}


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared dataset: where it is, the dataset itself, and the report as text."""

    directory: Path
    dataset: RecDataset
    report: str


def prepare_amazon(
    output_dir: str,
    *,
    category: str = "Musical_Instruments",
    reviews: str | None = None,
    metadata: str | None = None,
    download_dir: str = "downloads",
    base_url: str = AMAZON_URL,
    start: str = "2022-10-01",
    end: str = "2023-10-01",
    min_items: int = 10_000,
    rollback_months: int = 3,
    max_title_words: int = 20,
    require_price: bool = True,
    history_k_core: int | None = None,
    k_core: int = 0,
    min_rating: float | None = None,
    min_user_events: int = 1,
    item_statistics: str = "catalog",
    method: str = "time",
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    words: tuple[str, str] | None = None,
    truncated: str = "refuse",
    progress: bool = True,
) -> Prepared:
    """Prepare one category of Amazon Reviews 2023 by the paper's rules.

    Args:
        output_dir: directory of the dataset; replaced as a whole when everything succeeded.
        category: one of the 33 categories, e.g. Musical_Instruments.
        reviews: review file (.csv, .jsonl, each also .gz, or .parquet); None downloads the 5-core
            benchmark file.
        metadata: item metadata file, the same formats; None downloads it.
        download_dir: where downloads go and are found again.
        base_url: server of the downloads.
        start: first day of the window.
        end: first day after the window.
        min_items: the window's start moves back until this many items have events.
        rollback_months: by this many months at a time.
        max_title_words: items with more words in the title are dropped.
        require_price: items without a readable price are dropped.
        history_k_core: k-core over all time; None: 5 for raw reviews, 0 for benchmark files
            (no other columns than user_id, parent_asin, rating, timestamp), which are 5-core.
        k_core: iterative k-core within the window; 0 is off.
        min_rating: events rated lower, or not rated, are dropped; None keeps all.
        min_user_events: users with fewer events in the window are dropped; 1 as the paper.
        item_statistics: average_rating and rating_number as the "catalog" has them (the paper; may
            know the test time), from the reviews before the window ("window_start"), or "none".
        method: how examples are split: "time" (the paper) or "leave_one_out".
        fractions: shares of train, valid and test of a time split.
        words: what prompts call the items (plural, singular); None: shipped or derived words.
        truncated: a gzip file that stops early: "refuse" it, or "keep" the rows before the break.
        progress: show bars on stderr while downloading and reading.

    Raises:
        FileNotFoundError, ValueError, OSError: naming what was expected and what came. The output
            directory is then as it was before.
    """
    output = Path(output_dir)
    refuse_foreign(output)  # before the work, not after it
    plural, singular = category_words(category, words)
    rules = AmazonRules(
        start=start,
        end=end,
        min_items=min_items,
        rollback_months=rollback_months,
        max_title_words=max_title_words,
        require_price=require_price,
        history_k_core=history_k_core,
        k_core=k_core,
        min_rating=min_rating,
        min_user_events=min_user_events,
        item_statistics=item_statistics,
    )
    if reviews is None or metadata is None:
        review_url, metadata_url = amazon_urls(category, base_url)
        place = Path(download_dir)
        if reviews is None:
            reviews = str(download(review_url, place / Path(review_url).name, progress=progress))
        if metadata is None:
            metadata = str(
                download(metadata_url, place / Path(metadata_url).name, progress=progress)
            )
    with write_errors(output), _work_dir(output) as work:
        loaded = load_amazon(reviews, metadata, work, rules, truncated=truncated, progress=progress)
    sources = [
        {"name": s.path, "bytes": s.bytes_read, "sha256": s.sha256, "rows": s.rows}
        for s in loaded.sources
    ]
    settings = {
        "source": "amazon",
        "category": category,
        "rules": asdict(rules),
        "window_start": loaded.start,
        "sources": sources,
    }
    dataset = make_splits(loaded.data, method, fractions)
    return _write(dataset, output, settings, (plural, singular))


def prepare_movielens(
    path: str,
    output_dir: str,
    *,
    min_rating: float | None = None,
    k_core: int = 0,
    min_user_events: int = 2,
    keep_unused_items: bool | None = None,
    start: str | None = None,
    end: str | None = None,
    min_items: int = 0,
    rollback_months: int = 3,
    method: str = "time",
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    valid_from: str | None = None,
    test_from: str | None = None,
    words: tuple[str, str] | None = ("movies", "movie"),
) -> Prepared:
    """Prepare a MovieLens directory: 100k (u.data), 1m (.dat), 25m and latest (.csv).

    Args:
        path: the unpacked MovieLens directory.
        output_dir: directory of the dataset; replaced as a whole when everything succeeded.
        min_rating: ratings below this are dropped; None keeps all.
        k_core: iterative k-core of users and movies; 0 is off.
        min_user_events: users with fewer ratings are dropped.
        keep_unused_items: whether movies without ratings stay in the catalog; None: only
            without a k-core.
        start: first day of a time window; None is open.
        end: first day after it; None is open.
        min_items: `start` moves back until this many movies have ratings.
        rollback_months: by this many months at a time.
        method: "time", "leave_one_out" or "time_cut".
        fractions: shares of train, valid and test of a time split.
        valid_from: first time of valid for "time_cut".
        test_from: first time of test for "time_cut".
        words: what prompts call the items (plural, singular).
    """
    refuse_foreign(Path(output_dir))
    layout = find_movielens(path)
    data = load_interactions(
        path,
        format="movielens",
        min_user_events=min_user_events,
        min_rating=min_rating,
        k_core=k_core,
        keep_unused_items=keep_unused_items,
        start=start,
        end=end,
        min_items=min_items,
        rollback_months=rollback_months,
    )
    dataset = make_splits(data, method, fractions, valid_from, test_from)
    settings = {
        "source": "movielens",
        "layout": layout.name,
        "rules": {
            "min_rating": min_rating,
            "k_core": k_core,
            "min_user_events": min_user_events,
            "keep_unused_items": keep_unused_items,
            "start": start,
            "end": end,
            "min_items": min_items,
            "rollback_months": rollback_months,
        },
        "sources": [_source(layout.events), _source(layout.items)],
    }
    return _write(dataset, Path(output_dir), settings, category_words("movies", words))


def prepare_generic(
    path: str,
    output_dir: str,
    *,
    items: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    min_user_events: int = 2,
    min_rating: float | None = None,
    rating_range: tuple[float, float] = (0.0, float("inf")),
    repeats: str = "keep",
    k_core: int = 0,
    start: str | None = None,
    end: str | None = None,
    min_items: int = 0,
    rollback_months: int = 3,
    missing_text: str = "drop",
    keep_unused_items: bool | None = None,
    quote: str | None = "auto",
    truncated: str = "refuse",
    method: str | None = None,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    valid_from: str | None = None,
    test_from: str | None = None,
    words: tuple[str, str] | None = ("products", "product"),
) -> Prepared:
    """Prepare any interaction log.

    Args:
        path: the log; see load_interactions for formats.
        output_dir: directory of the dataset; replaced as a whole when everything succeeded.
        items: the item table.
        format: "auto", "csv", "tsv", "jsonl", "parquet", "recbole", "movielens" or "sequences".
        columns: our name (user_id, item_id, timestamp, rating) -> the log's name.
        item_columns: our name (item_id, title, description, ...) -> the item table's name; other
            names become text columns.
        min_user_events: users with fewer events are dropped.
        min_rating: events rated lower, or not rated, are dropped; None keeps all.
        rating_range: (lowest, highest) valid rating.
        repeats: "keep" all events of a user with one item, or only the "first" or "last".
        k_core: iterative k-core of users and items; 0 is off.
        start: first day of a time window; None is open.
        end: first day after it; None is open.
        min_items: `start` moves back until this many items have events.
        rollback_months: by this many months at a time.
        missing_text: items without text: "drop", "refuse" or "use_id".
        keep_unused_items: whether items without events stay in the catalog; None: only
            without a k-core.
        quote: the quote character of CSV; None: quotes are ordinary characters.
        truncated: a gzip file that stops early: "refuse" it, or "keep" the rows before the break.
        method: "time", "leave_one_out" or "time_cut"; None: "time" where there are times.
        fractions: shares of train, valid and test of a time split.
        valid_from: first time of valid for "time_cut".
        test_from: first time of test for "time_cut".
        words: what prompts call the items (plural, singular).
    """
    refuse_foreign(Path(output_dir))
    rules: dict[str, Any] = {
        "format": format,
        "columns": None if columns is None else dict(columns),
        "item_columns": None if item_columns is None else dict(item_columns),
        "min_user_events": min_user_events,
        "min_rating": min_rating,
        "rating_range": tuple(rating_range),
        "repeats": repeats,
        "k_core": k_core,
        "start": start,
        "end": end,
        "min_items": min_items,
        "rollback_months": rollback_months,
        "missing_text": missing_text,
        "keep_unused_items": keep_unused_items,
        "quote": quote,
        "truncated": truncated,
    }
    data = load_interactions(path, items=items, **rules)
    if method is None:
        method = "leave_one_out" if data.timestamp is None else "time"
    dataset = make_splits(data, method, fractions, valid_from, test_from)
    # JSON has no infinity.
    rules["rating_range"] = [None if abs(x) == float("inf") else x for x in rating_range]
    sources = [_source(Path(p)) for p in (path, items) if p is not None and Path(p).is_file()]
    settings = {"source": "generic", "rules": rules, "sources": sources}
    return _write(dataset, Path(output_dir), settings, category_words("products", words))


@dataclass(frozen=True)
class PaperCheck:
    """Agreement of a prepared Amazon category with the paper's table."""

    matches: bool
    text: str


def check_amazon(data: str) -> PaperCheck:
    """Compare a prepared category with the paper's dataset table.

    Args:
        data: directory written by prepare_amazon.

    Returns:
        Whether every number agrees, and the comparison as text.

    Raises:
        ValueError: not one of the paper's three categories.
    """
    manifest = read_manifest(data)
    settings = manifest["settings"]
    category = settings.get("category")
    if category not in PAPER:
        raise ValueError(
            f"data: the paper has {', '.join(PAPER)}; {data} is "
            f"{category or settings.get('source', 'something else')!r}"
        )
    counts = manifest["counts"]
    names = ("users", "items", "train", "valid", "test")
    lines = [f"{category}: {'':12}{'paper':>10}{'here':>10}{'difference':>12}"]
    matches = True
    for name, wanted in zip(names, PAPER[category], strict=True):
        got = counts[name]
        matches &= got == wanted
        lines.append(f"  {name:<24}{wanted:>12,}{got:>10,}{got - wanted:>+12,}")
    changed = [
        f"{name}={value!r}"
        for name, value in settings["rules"].items()
        if value != asdict(AmazonRules())[name]
    ]
    if changed:
        lines.append(f"settings that differ from the paper's: {', '.join(changed)}")
    lines.append("agrees with the paper" if matches else "does NOT agree with the paper")
    return PaperCheck(matches, "\n".join(lines))


def _write(
    dataset: RecDataset, output: Path, settings: dict[str, Any], words: tuple[str, str]
) -> Prepared:
    prompt = {"category": words[0], "category_singular": words[1]}
    everything = {**settings, "prompt": prompt, **dataset.settings}
    dataset = replace(dataset, settings=everything)
    report = summary_text(dataset)
    extra = {"report.txt": f"{report}\n".encode(), "report.png": summary_png(dataset)}
    save_dataset(dataset, output, extra, argument="output_dir")
    return Prepared(output, dataset, report)


def _work_dir(output: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{output.name}.work.", dir=output.parent)
    except OSError as error:
        raise type(error)(
            error.errno, f"output_dir: cannot write to {output}: {error.strerror}"
        ) from error


def _source(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}

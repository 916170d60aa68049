"""Source files -> a dataset directory: Parquet tables, manifest.json, report.txt, report.png."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from r2ec_fast.data.categories import category_words
from r2ec_fast.data.dataset import RecDataset
from r2ec_fast.data.settings import EventRules, LoadSettings
from r2ec_fast.data.sources.amazon import AMAZON_URL, AmazonRules, amazon_urls, load_amazon
from r2ec_fast.data.sources.download import download
from r2ec_fast.data.sources.generic import read_interactions
from r2ec_fast.data.sources.movielens import find_movielens
from r2ec_fast.data.splits import make_splits
from r2ec_fast.data.store import (
    file_sha256,
    read_manifest,
    refuse_foreign,
    write_errors,
)
from r2ec_fast.data.summary import summary_png, summary_text

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
    method: str = "time",
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    words: tuple[str, str] | None = None,
    truncated: str = "refuse",
    progress: bool = True,
    **rules: Any,
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
        method: how examples are split: "time" (the paper) or "leave_one_out".
        fractions: shares of train, valid and test of a time split.
        words: what prompts call the items (plural, singular); None: shipped or derived words.
        truncated: a gzip file that stops early: "refuse" it, or "keep" the rows before the break.
        progress: show bars on stderr while downloading and reading.
        **rules: those of `AmazonRules`.

    Raises:
        FileNotFoundError, ValueError, OSError: naming what was expected and what came. The output
            directory is then as it was before.
    """
    output = Path(output_dir)
    refuse_foreign(output)  # before the work, not after it
    shown_words = category_words(category, words)
    chosen = AmazonRules(**rules)
    if reviews is None or metadata is None:
        review_url, metadata_url = amazon_urls(category, base_url)
        fetch = partial(_fetched, place=Path(download_dir), progress=progress)
        reviews = fetch(review_url) if reviews is None else reviews
        metadata = fetch(metadata_url) if metadata is None else metadata
    with write_errors(output), _work_dir(output) as work:
        loaded = load_amazon(
            reviews, metadata, work, chosen, truncated=truncated, progress=progress
        )
    settings = {
        "source": "amazon",
        "category": category,
        "rules": asdict(chosen),
        "window_start": loaded.start,
        "sources": [
            {"name": s.path, "bytes": s.bytes_read, "sha256": s.sha256, "rows": s.rows}
            for s in loaded.sources
        ],
    }
    return _write(make_splits(loaded.data, method, fractions), output, settings, shown_words)


def prepare_movielens(
    path: str,
    output_dir: str,
    *,
    keep_unused_items: bool | None = None,
    method: str = "time",
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    valid_from: str | None = None,
    test_from: str | None = None,
    words: tuple[str, str] | None = ("movies", "movie"),
    **rules: Any,
) -> Prepared:
    """Prepare a MovieLens directory: 100k (u.data), 1m (.dat), 25m and latest (.csv).

    Args:
        path: the unpacked MovieLens directory.
        output_dir: directory of the dataset; replaced as a whole when everything succeeded.
        keep_unused_items: whether movies without ratings stay in the catalog; None: only
            without a k-core.
        method: "time", "leave_one_out" or "time_cut".
        fractions: shares of train, valid and test of a time split.
        valid_from: first time of valid for "time_cut".
        test_from: first time of test for "time_cut".
        words: what prompts call the items (plural, singular).
        **rules: those of `EventRules`.
    """
    refuse_foreign(Path(output_dir))
    layout = find_movielens(path)
    chosen = asdict(EventRules(**rules)) | {"keep_unused_items": keep_unused_items}
    data = read_interactions(path, None, LoadSettings(format="movielens", **chosen))
    dataset = make_splits(data, method, fractions, valid_from, test_from)
    settings = {
        "source": "movielens",
        "layout": layout.name,
        "rules": chosen,
        "sources": [_source(layout.events), _source(layout.items)],
    }
    return _write(dataset, Path(output_dir), settings, category_words("movies", words))


def prepare_generic(
    path: str,
    output_dir: str,
    *,
    items: str | None = None,
    method: str | None = None,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    valid_from: str | None = None,
    test_from: str | None = None,
    words: tuple[str, str] | None = ("products", "product"),
    **settings: Any,
) -> Prepared:
    """Prepare any interaction log.

    Args:
        path: the log; see load_interactions for formats.
        output_dir: directory of the dataset; replaced as a whole when everything succeeded.
        items: the item table.
        method: "time", "leave_one_out" or "time_cut"; None: "time" where there are times.
        fractions: shares of train, valid and test of a time split.
        valid_from: first time of valid for "time_cut".
        test_from: first time of test for "time_cut".
        words: what prompts call the items (plural, singular).
        **settings: those of `LoadSettings`.
    """
    refuse_foreign(Path(output_dir))
    chosen = LoadSettings(**settings)
    data = read_interactions(path, items, chosen)
    if method is None:
        method = "leave_one_out" if data.timestamp is None else "time"
    dataset = make_splits(data, method, fractions, valid_from, test_from)
    sources = [_source(Path(p)) for p in (path, items) if p is not None and Path(p).is_file()]
    kept = {"source": "generic", "rules": chosen.to_dict(), "sources": sources}
    return _write(dataset, Path(output_dir), kept, category_words("products", words))


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
    dataset.save(output, extra, argument="output_dir")
    return Prepared(output, dataset, report)


def _work_dir(output: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=f".{output.name}.work.", dir=output.parent)
    except OSError as error:
        raise type(error)(
            error.errno, f"output_dir: cannot write to {output}: {error.strerror}"
        ) from error


def _fetched(url: str, place: Path, progress: bool) -> str:
    return str(download(url, place / Path(url).name, progress=progress))


def _source(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}

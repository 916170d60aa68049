"""A dataset on disk: four Parquet tables and manifest.json, written all or nothing."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from r2ec_fast.data.report import LoadReport
from r2ec_fast.data.types import Catalog, Examples, IdMap, InteractionData
from r2ec_fast.utils.atomic_files import finish_interrupted, updated_directory

FORMAT = "r2ec-fast dataset"
FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")
FILES = ("users.parquet", "items.parquet", "events.parquet", "examples.parquet")


class Parts(NamedTuple):
    """What a dataset on disk holds; the fields of `RecDataset`, in its order."""

    data: InteractionData
    train: Examples
    valid: Examples
    test: Examples
    settings: dict[str, Any]


def save_dataset(
    dataset: Parts,
    directory: str | Path,
    extra: Mapping[str, bytes] | None = None,
    argument: str = "directory",
) -> None:
    """Write `dataset` into `directory`; the files of an older dataset there are replaced, all other
    files stay.

    The bytes depend on the dataset alone: no clock, no host, no path enters a file.

    Args:
        dataset: what to write. External ids must be all text or all integers.
        directory: created; must not be a directory of something else.
        extra: further files by name, e.g. a report and its picture.
        argument: what the caller calls `directory`, for messages.

    Raises:
        ValueError: ids of mixed types, or `directory` holds something that is not a dataset.
        OSError: the place cannot be written or is full; the message names it, nothing is left.
    """
    directory = Path(directory)
    refuse_foreign(directory)
    tables = _tables(dataset)
    owned = _listed(directory)
    with (
        write_errors(directory),
        updated_directory(directory, argument, owned=owned.__contains__) as temporary,
    ):
        for name, table in tables.items():
            with open(temporary / name, "wb") as file:
                table.write_parquet(file, compression="zstd")
        for name, content in (extra or {}).items():
            (temporary / name).write_bytes(content)
        manifest = _manifest(dataset, temporary)
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
        (temporary / "manifest.json").write_text(text + "\n", encoding="utf-8")


def load_dataset(directory: str | Path) -> Parts:
    """Read a dataset written by `save_dataset`.

    Raises:
        FileNotFoundError: there is no dataset.
        ValueError: the manifest or a table is damaged, or of another format version.
    """
    directory = Path(directory)
    finish_interrupted(directory)
    manifest = read_manifest(directory)
    tables = {}
    for name in FILES:
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{directory}: damaged dataset, {name} is missing")
        if file_sha256(path) != manifest["files"][name]["sha256"]:
            raise ValueError(f"{directory}: damaged dataset, {name} differs from its manifest")
        tables[name] = pl.read_parquet(path)
    items, events, examples = tables["items.parquet"], tables["events.parquet"], tables[FILES[3]]
    users = IdMap(tables["users.parquet"]["user_id"].to_list())
    counts = np.bincount(events["user"].to_numpy(), minlength=len(users))
    columns = events.columns
    data = InteractionData(
        users=users,
        catalog=Catalog(IdMap(items["item_id"].to_list()), items.drop("item_id")),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        item=events["item"].to_numpy().astype(np.int64),
        timestamp=events["timestamp"].to_numpy().copy() if "timestamp" in columns else None,
        rating=events["rating"].to_numpy().copy() if "rating" in columns else None,
        report=LoadReport.from_dict(manifest["report"]),
    )
    train, valid, test = (_examples_of(examples, number) for number in range(len(SPLITS)))
    return Parts(data, train, valid, test, manifest["settings"])


def _examples_of(table: pl.DataFrame, split: int) -> Examples:
    part = table.filter(pl.col("split") == split)
    return Examples(part["user"].to_numpy().copy(), part["position"].to_numpy().copy())


def save_catalog(catalog: Catalog, path: str | Path) -> None:
    """Write the items (external ids and all fields) as one Parquet file."""
    item_ids = _id_column("item_id", catalog.ids)
    table = pl.DataFrame([item_ids, *catalog.fields.get_columns()])
    with write_errors(path), open(path, "wb") as file:
        table.write_parquet(file, compression="zstd")


def load_catalog(path: str | Path) -> Catalog:
    """Read the items back.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: the file is damaged, or holds no catalog.
    """
    try:
        items = pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    absent = items["item_id"].null_count() if "item_id" in items.columns else None
    if absent != 0:
        found = f"columns {items.columns}" if absent is None else f"{absent} missing"
        raise ValueError(
            f"{path}: expected a column 'item_id' with an id for every item, got {found}"
        )
    try:
        return Catalog(IdMap(items["item_id"].to_list()), items.drop("item_id"))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a dataset directory, checked for its format."""
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no dataset here (manifest.json is missing)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a readable manifest: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}; this is another kind of manifest")
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected format version {FORMAT_VERSION}, got {manifest['format_version']}"
        )
    return manifest


@contextmanager
def write_errors(place: str | Path) -> Iterator[None]:
    """Turn a full disk into an OSError which names `place` and says what to do."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        number = getattr(error, "errno", None)
        if number is None:  # the Parquet writer says it in words
            found = re.search(r"\(os error (\d+)\)", str(error))
            number = int(found.group(1)) if found else None
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                number,
                f"no space left to write {place}; nothing was kept. "
                "Free some space or choose another output directory",
            ) from error
        raise


def _tables(dataset: Parts) -> dict[str, pl.DataFrame]:
    data = dataset.data
    lengths = np.diff(data.offsets)
    events: dict[str, np.ndarray] = {
        "user": np.repeat(np.arange(data.num_users, dtype=np.int64), lengths),
        "item": data.item,
    }
    if data.timestamp is not None:
        events["timestamp"] = data.timestamp
    if data.rating is not None:
        events["rating"] = data.rating
    parts = [getattr(dataset, name) for name in SPLITS]
    examples = {
        "split": np.repeat(np.arange(3, dtype=np.int8), [len(p) for p in parts]),
        "user": np.concatenate([p.user for p in parts]),
        "position": np.concatenate([p.position for p in parts]),
    }
    item_ids = _id_column("item_id", data.catalog.ids)
    return {
        "users.parquet": pl.DataFrame([_id_column("user_id", data.users)]),
        "items.parquet": pl.DataFrame([item_ids, *data.catalog.fields.get_columns()]),
        "events.parquet": pl.DataFrame(events),
        "examples.parquet": pl.DataFrame(examples),
    }


def _id_column(name: str, ids: IdMap) -> pl.Series:
    kinds = {type(x) for x in ids.ids}
    if kinds <= {str}:
        return pl.Series(name, list(ids.ids), dtype=pl.String)
    if kinds == {int}:
        return pl.Series(name, list(ids.ids), dtype=pl.Int64)
    found = sorted(kind.__name__ for kind in kinds)
    raise ValueError(f"{name}: only ids that are all text or all integers are saved, got {found}")


def _manifest(dataset: Parts, directory: Path) -> dict[str, Any]:
    data = dataset.data
    files = sorted(path for path in directory.iterdir())
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "version": package_version(),
        "settings": dataset.settings,
        "counts": {
            "users": data.num_users,
            "items": data.num_items,
            "events": data.num_events,
            **{name: len(getattr(dataset, name)) for name in SPLITS},
        },
        "report": data.report.to_dict(),
        "files": {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in files},
    }


def package_version() -> str:
    """Version of the installed package; "source" for a checkout that is not installed."""
    try:
        return importlib.metadata.version("r2ec-fast")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(directory: Path) -> set[str]:
    """The files of the dataset in `directory`, by its manifest; none where there is no dataset."""
    try:
        return {"manifest.json", *read_manifest(directory)["files"]}
    except (FileNotFoundError, ValueError):
        return {"manifest.json"}


def refuse_foreign(directory: Path) -> None:
    """Raise ValueError if `directory` is a file or holds something that is not a dataset."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"directory: expected a directory, {directory} is a file")
    if any(directory.iterdir()) and not (directory / "manifest.json").is_file():
        raise ValueError(
            f"directory: {directory} holds files that are not a dataset; "
            "choose an empty or a new directory"
        )

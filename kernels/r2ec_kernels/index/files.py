"""Tensors on disk: a safetensors file whose metadata hold settings and a checksum of the data."""

import hashlib
import os
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._checks import MAX_ITEMS
from .._files import replacing

_MAGIC = "r2ec_kernels.ItemIndex"

T = TypeVar("T", int, float)


class SavedIndex(NamedTuple):
    """What a file of an ItemIndex holds."""

    settings: dict[str, Any]  # similarity, temperature, scan
    ids: torch.Tensor  # int64 [n], distinct
    rows: torch.Tensor  # [n, d]
    next_id: int


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], settings: dict[str, str]
) -> None:
    """Write tensors and string settings to ``path``; an old file is replaced at the end or not."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _MAGIC, "sha256": _checksum(tensors), **settings}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_tensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, settings) that ``write_tensors`` wrote. The tensors are views of the mapped file,
    which takes no memory of its own; copy what is to be written.

    Raises:
        ValueError: the file is truncated, changed, or of another kind.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, it is damaged or truncated: {error}"
        ) from error
    if (kind := metadata.pop("format", None)) != _MAGIC:
        raise ValueError(f"{path}: expected an ItemIndex file, got {kind!r}")
    if _checksum(tensors) != metadata.pop("sha256", None):
        raise ValueError(f"{path}: the checksum does not match: the file was changed")
    return tensors, metadata


def read_index(path: str | os.PathLike[str]) -> SavedIndex:
    """The index in ``path``, its ids checked.

    Raises:
        ValueError: as ``read_tensors``, or these are no tensors and settings of an index.
    """
    tensors, settings = read_tensors(path)
    wanted = {"similarity", "temperature", "scan", "next_id"}
    if not wanted <= settings.keys() or tensors.keys() != {"ids", "rows"}:
        raise ValueError(f"{path}: expected an ItemIndex, found {sorted(tensors)}")
    ids, rows = tensors["ids"], tensors["rows"]
    next_id = _number(path, settings, "next_id", int)
    if not 0 <= next_id <= MAX_ITEMS:
        raise ValueError(f"{path}: next_id: expected 0..{MAX_ITEMS}, got {next_id}")
    if ids.dtype != torch.int64 or ids.shape != rows.shape[:1]:
        raise ValueError(
            f"{path}: ids: expected int64 {list(rows.shape[:1])}, an id for each row, "
            f"got {ids.dtype} {list(ids.shape)}"
        )
    outside = ids[(ids < 0) | (ids >= next_id)]
    if outside.numel():
        raise ValueError(
            f"{path}: ids: expected 0..{next_id - 1}, below next_id, got {int(outside[0])}"
        )
    if ids.unique().numel() != ids.numel():
        raise ValueError(f"{path}: ids: expected distinct ids, got repeats")
    kept = {
        "similarity": settings["similarity"],
        "temperature": _number(path, settings, "temperature", float),
        "scan": settings["scan"],
    }
    return SavedIndex(kept, ids, rows, next_id)


def _number(path: str | os.PathLike[str], settings: dict[str, str], name: str, kind: type[T]) -> T:
    """The setting ``name`` as a number of type ``kind``."""
    try:
        return kind(settings[name])
    except ValueError:
        raise ValueError(
            f"{path}: {name}: expected {kind.__name__}, got {settings[name]!r}"
        ) from None


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of the tensors' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        if tensor.numel():
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()

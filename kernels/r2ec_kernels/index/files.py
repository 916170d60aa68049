"""Tensors on disk: a safetensors file whose metadata hold settings and a checksum of the data."""

import hashlib
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._files import replacing

_MAGIC = "r2ec_kernels.ItemIndex"


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


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of the tensors' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        if tensor.numel():
            digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()

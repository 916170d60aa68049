"""Tensors on disk in the safetensors format, with a checksum, without the safetensors package."""

import hashlib
import json
import os
import tempfile

import torch

_MAGIC = "r2ec_kernels.ItemIndex"
_MAX_HEADER = 1 << 20
_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_tensors(
    path: str | os.PathLike, tensors: dict[str, torch.Tensor], settings: dict[str, str]
) -> None:
    """Write tensors and string settings to ``path``; an old file is replaced at the end or not."""
    layout, data, offset = {}, [], 0
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        view = memoryview(tensor.view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
        digest.update(view)
        data.append(view)
        layout[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + view.nbytes],
        }
        offset += view.nbytes
    metadata = {"format": _MAGIC, "sha256": digest.hexdigest(), **settings}
    header = json.dumps({"__metadata__": metadata, **layout}).encode()
    header += b" " * (-len(header) % 8)
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=os.path.basename(path) + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for view in data:
                file.write(view)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, settings) that ``write_tensors`` wrote.

    Raises:
        ValueError: the file is truncated, changed, or of another kind.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= _MAX_HEADER:
            raise ValueError(f"{path}: expected a safetensors file, its header length is {length}")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__")
            known = metadata["format"] == _MAGIC
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected an ItemIndex file, its header is damaged"
            ) from error
        if not known:
            raise ValueError(f"{path}: expected an ItemIndex file, got {metadata['format']!r}")
        data = bytearray(os.path.getsize(path) - 8 - length)
        file.readinto(data)
    size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if len(data) != size:
        raise ValueError(f"{path}: expected {size} bytes of data, got {len(data)}: truncated")
    if hashlib.sha256(data).hexdigest() != metadata.pop("sha256", None):
        raise ValueError(f"{path}: the checksum does not match: the file was changed")
    metadata.pop("format")
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if end == begin:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        flat = torch.frombuffer(data, dtype=torch.uint8)[begin:end]
        tensors[name] = flat.clone().view(dtype).view(shape)
    return tensors, metadata

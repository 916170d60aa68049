"""Our files in other readers, and theirs in ours. The readers: safetensors' numpy side, and the
format's own description (8 bytes of length, a JSON header, the data) in plain Python."""

import hashlib
import json
import struct

import numpy as np
import pytest
import safetensors.numpy
import torch
from _support.toy import toy_dataset, toy_model

from r2ec_fast.model.r2ec import R2ecModel
from r2ec_kernels import ItemIndex

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}
SETTINGS = {"similarity": "dot", "temperature": "1.0", "scan": "none", "next_id": "9"}
ROWS = np.array([[1, 0], [0, 1], [1, 1], [-1, 0]], np.float32)
IDS = np.array([8, 0, 3, 5])


def parse(data: bytes) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]:
    """(name -> (type, shape, bytes), metadata) of a safetensors file, its rules asserted."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    assert header[:1] == b"{" and header == header.rstrip(b" ") + b" " * (-len(header.rstrip()) % 8)
    fields = json.loads(header)
    metadata = fields.pop("__metadata__", {})
    assert all(isinstance(value, str) for value in metadata.values())
    tensors, end = {}, 0
    for name, field in sorted(fields.items(), key=lambda pair: pair[1]["data_offsets"]):
        start, stop = field["data_offsets"]
        assert start == end and start % SIZES[field["dtype"]] == 0, "no holes, aligned"
        assert stop - start == SIZES[field["dtype"]] * int(np.prod(field["shape"]))
        tensors[name] = (field["dtype"], field["shape"], body[start:stop])
        end = stop
    assert end == len(body)
    return tensors, metadata


def unparse(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file with a header that is neither sorted nor padded."""
    names = {"float32": "F32", "int64": "I64", "int32": "I32"}
    fields, body = {}, b""
    for name, array in tensors.items():
        stop = len(body) + array.nbytes
        fields[name] = {
            "data_offsets": [len(body), stop],
            "shape": list(array.shape),
            "dtype": names[array.dtype.name],
        }
        body += array.tobytes()
    header = json.dumps({**fields, "__metadata__": metadata}, indent=1).encode()
    return struct.pack("<Q", len(header)) + header + body


def digest(tensors: dict[str, np.ndarray]) -> str:
    """What an index writes as "sha256": the bytes of the tensors in the order of their names."""
    return hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()


def metadata_of(tensors: dict[str, np.ndarray], **settings: str) -> dict[str, str]:
    return {"format": "r2ec_kernels.ItemIndex", "sha256": digest(tensors), **SETTINGS, **settings}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_index_by_the_format_description(tmp_path, dtype):
    index = ItemIndex(torch.randn(300, 12).to(dtype), similarity="cosine", temperature=0.1)
    index.remove([5, 299])
    index.save(tmp_path / "index.safetensors")
    tensors, metadata = parse((tmp_path / "index.safetensors").read_bytes())
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert set(tensors) == {"ids", "rows"}
    assert tensors["ids"][:2] == ("I64", [298]) and tensors["rows"][:2] == (kind, [298, 12])
    ids = np.frombuffer(tensors["ids"][2], np.int64)
    assert ids.tolist() == index.ids.tolist()
    rows = torch.frombuffer(bytearray(tensors["rows"][2]), dtype=dtype).view(298, 12)
    assert torch.equal(rows, index.items[index.ids])
    assert metadata["sha256"] == hashlib.sha256(tensors["ids"][2] + tensors["rows"][2]).hexdigest()
    assert (metadata["similarity"], float(metadata["temperature"])) == ("cosine", 0.1)
    assert metadata["next_id"] == "300"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_index_in_numpy(tmp_path, dtype):
    index = ItemIndex(torch.randn(30, 12).to(dtype))
    index.save(tmp_path / "index.safetensors")
    read = safetensors.numpy.load_file(tmp_path / "index.safetensors")
    np.testing.assert_array_equal(read["rows"], index.items.numpy())
    np.testing.assert_array_equal(read["ids"], np.arange(30))


@pytest.mark.parametrize("writer", ["numpy", "plain"])
def test_an_index_that_others_wrote(tmp_path, writer):
    """Ids in any order, with gaps; equal scores still come lower id first."""
    tensors = {"rows": ROWS, "ids": IDS}
    path = tmp_path / "index.safetensors"
    if writer == "numpy":
        safetensors.numpy.save_file(tensors, path, metadata=metadata_of(tensors))
    else:
        path.write_bytes(unparse(tensors, metadata_of(tensors)))
    index = ItemIndex.load(path)
    assert index.ids.tolist() == [0, 3, 5, 8]
    top = index.search(torch.tensor([[1.0, 0.0]]), 5)
    assert top.indices.tolist() == [[3, 8, 0, 5, -1]]
    assert top.scores.tolist() == [[1, 1, 0, -1, -np.inf]]
    assert index.append(torch.ones(1, 2)).tolist() == [9]


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"ids": np.array([-1, 0, 3, 5])}, {}, r"ids: expected 0\.\.8, below next_id, got -1"),
        ({"ids": np.array([8, 0, 3, 9])}, {}, r"ids: expected 0\.\.8, below next_id, got 9"),
        ({"ids": np.array([8, 0, 3, 8])}, {}, "ids: expected distinct ids, got repeats"),
        ({"ids": np.array([8, 0, 3])}, {}, r"expected int64 \[4\].*got torch.int64 \[3\]"),
        ({"ids": IDS[None]}, {}, r"expected int64 \[4\].*got torch.int64 \[1, 4\]"),
        ({"ids": IDS.astype(np.int32)}, {}, r"expected int64 \[4\].*got torch.int32 \[4\]"),
        ({}, {"next_id": "-5"}, r"next_id: expected 0\.\.4294967295, got -5"),
        ({}, {"next_id": "99999999999"}, r"next_id: expected 0\.\.4294967295, got 99999999999"),
        ({}, {"next_id": "many"}, "next_id: expected int, got 'many'"),
        ({}, {"temperature": "warm"}, "temperature: expected float, got 'warm'"),
        ({}, {"similarity": "tanimoto"}, "similarity: expected one of dot, cosine, l2"),
        ({}, {"sha256": "0" * 64}, "the checksum does not match"),
    ],
)
def test_an_index_that_others_wrote_wrong(tmp_path, change, settings, words):
    tensors = {"rows": ROWS, "ids": IDS} | change
    path = tmp_path / "index.safetensors"
    path.write_bytes(unparse(tensors, metadata_of(tensors, **settings)))
    with pytest.raises(ValueError, match=words):
        ItemIndex.load(path)


def test_a_model_by_the_format_description(tmp_path):
    model = toy_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    tensors, _ = parse((tmp_path / "model" / "model.safetensors").read_bytes())
    state = model.backbone.state_dict()
    assert set(tensors) <= set(state) and len(tensors) > 10
    for name, (kind, shape, data) in tensors.items():
        assert (kind, shape) == ("F32", list(state[name].shape))
        assert data == state[name].contiguous().numpy().tobytes(), name


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["bare", "pt"])
def test_a_model_whose_weights_others_wrote(tmp_path, metadata):
    """The weights of another model of the same shape, written by numpy: its states, and its
    rows of the item table, are those of that model."""
    first, second = (toy_model(dtype=torch.float32, seed=seed) for seed in (0, 1))
    catalog = toy_dataset().data.catalog
    first.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    names = safetensors.numpy.load_file(path)
    weights = second.backbone.state_dict()
    safetensors.numpy.save_file({n: weights[n].numpy() for n in names}, path, metadata=metadata)
    read = R2ecModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(read.encode_items(catalog), second.encode_items(catalog))
    assert not torch.allclose(read.encode_items(catalog), first.encode_items(catalog))

"""What to_rows takes: numpy, DLPack, jagged tensors, KeyedJaggedTensor, Arrow; without a copy."""

import numpy as np
import pytest
import torch

from r2ec_fast.packing.packer import pack_histories, to_rows

VALUES = [5, 6, 7, 8, 9, 10]
OFFSETS = [0, 2, 3, 6]


class KeyedJagged:
    """The part of torchrec's KeyedJaggedTensor that counts here: keys x batch rows, key-major."""

    def __init__(self, values, offsets):
        self._values, self._offsets = values, offsets

    def values(self):
        return self._values

    def offsets(self):
        return self._offsets


class OnlyDLPack:
    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **kwargs):
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def check(rows, memory: np.ndarray | None):
    values, offsets = to_rows(rows)
    assert values.tolist() == VALUES and offsets.tolist() == OFFSETS
    assert offsets.dtype == np.int64
    if memory is not None:
        assert np.shares_memory(values, memory)
    [batch] = pack_histories(rows, max_tokens=10)
    assert batch.input_ids.tolist() == [VALUES]
    assert batch.input_ids.dtype == torch.int64
    assert batch.cu_seq_lens_q.tolist() == OFFSETS


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("offsets_dtype", [np.int32, np.int64])
def test_numpy_pairs(dtype, offsets_dtype):
    values = np.array(VALUES, dtype)
    check((values, np.array(OFFSETS, offsets_dtype)), values)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_torch_pairs(dtype):
    values = torch.tensor(VALUES, dtype=dtype)
    check((values, torch.tensor(OFFSETS)), values.numpy())


def test_dlpack_pairs():
    values = np.array(VALUES)
    check((OnlyDLPack(values), OnlyDLPack(np.array(OFFSETS))), values)


def test_jagged_tensors():
    values = torch.tensor(VALUES)
    jagged = torch.nested.nested_tensor_from_jagged(values, torch.tensor(OFFSETS))
    check(jagged, values.numpy())


def test_jagged_tensors_with_holes_are_refused():
    jagged = torch.nested.nested_tensor_from_jagged(
        torch.tensor(VALUES), torch.tensor(OFFSETS), lengths=torch.tensor([1, 1, 2])
    )
    with pytest.raises(ValueError, match="prompts: a nested tensor with holes"):
        pack_histories(jagged, max_tokens=10)


def test_keyed_jagged_tensors():
    values = torch.tensor(VALUES, dtype=torch.int32)
    check(KeyedJagged(values, torch.tensor(OFFSETS, dtype=torch.int32)), values.numpy())


@pytest.mark.parametrize("large", [False, True])
def test_arrow_list_arrays(large):
    pa = pytest.importorskip("pyarrow")
    kind = pa.large_list(pa.int64()) if large else pa.list_(pa.int32())
    rows = [VALUES[a:b] for a, b in zip(OFFSETS[:-1], OFFSETS[1:], strict=True)]
    array = pa.array(rows, type=kind)
    check(array, array.values.to_numpy())
    longer = pa.array([[1, 2, 3], *rows, [4]], type=kind)
    check(longer.slice(1, 3), longer.values.to_numpy())
    check(pa.chunked_array([array.slice(0, 1), array.slice(1)]), None)


def test_arrow_nulls_are_refused():
    pa = pytest.importorskip("pyarrow")
    for rows in ([[1], None], [[1, None]]):
        with pytest.raises(TypeError, match="without nulls"):
            to_rows(pa.array(rows))
    with pytest.raises(TypeError, match="Arrow list array"):
        to_rows(pa.array([1, 2]))


def test_lists_of_rows():
    rows = [VALUES[a:b] for a, b in zip(OFFSETS[:-1], OFFSETS[1:], strict=True)]
    check(rows, None)
    check([np.array(r, np.int32) for r in rows], None)
    check([torch.tensor(r) for r in rows], None)
    check([tuple(r) for r in rows], None)


def test_strided_values_are_copied_once():
    wide = np.stack([np.array(VALUES), np.zeros(6, np.int64)], axis=1)
    check((wide[:, 0], np.array(OFFSETS)), None)


def test_other_devices_are_named():
    with pytest.raises(ValueError, match="prompts values must be in CPU memory"):
        to_rows((torch.empty(3, device="meta", dtype=torch.int64), [0, 3]), "prompts")


def test_unsigned_64_bit_is_refused():
    with pytest.raises(TypeError, match="uint64"):
        to_rows((np.array(VALUES, np.uint64), np.array(OFFSETS)))

"""Ragged: what it takes, without a copy, and its operations against lists of lists."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r2ec_fast.packing import Ragged, pack_histories
from r2ec_fast.packing.ragged import common_prefix

VALUES = [5, 6, 7, 8, 9, 10]
OFFSETS = [0, 2, 3, 6]
ROWS = st.lists(st.lists(st.integers(-3, 3), max_size=6), max_size=8)
SOME_ROWS = st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=8)


def lists(rows: Ragged) -> list[list[int]]:
    return [row.tolist() for row in rows]


# ---- operations ---------------------------------------------------------------------------------


@given(ROWS)
def test_a_sequence_of_its_rows(rows):
    ragged = Ragged.of(rows)
    assert ragged.values.dtype == ragged.offsets.dtype == np.int64
    assert len(ragged) == len(rows) and lists(ragged) == rows
    assert [ragged[i].tolist() for i in range(-len(rows), len(rows))] == rows + rows
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    for i in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            ragged[i]
    assert Ragged.of(ragged) is ragged


@given(ROWS, st.data())
def test_selections(rows, data):
    ragged = Ragged.of(rows)
    ids = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12)) if rows else []
    aligned = -ragged.values
    assert lists(ragged.select(ids)) == [rows[i] for i in ids]
    assert lists(ragged.select(np.array(ids, np.int32))) == [rows[i] for i in ids]
    assert aligned[ragged.positions(ids)].tolist() == [-v for i in ids for v in rows[i]]
    part = data.draw(st.slices(len(rows)))
    assert lists(ragged[part]) == rows[part]


@given(ROWS, ROWS, st.lists(st.integers(0, 9), max_size=3))
def test_rows_are_joined_and_stacked(rows, others, suffix):
    ragged, other = Ragged.of(rows), Ragged.of(others)
    assert lists(ragged.append(suffix)) == [row + suffix for row in rows]
    assert lists(Ragged.stack([ragged, other, ragged])) == rows + others + rows
    if len(rows) == len(others):
        both = [a + b for a, b in zip(rows, others, strict=True)]
        assert lists(ragged.join(other)) == both
    else:
        with pytest.raises(ValueError, match="zip"):
            ragged.join(other)


@given(SOME_ROWS)
def test_the_common_prefix_is_taken_off(rows):
    ragged = Ragged.of(rows)
    expected = 0
    while all(len(r) > expected and r[expected] == rows[0][expected] for r in rows):
        expected += 1
    assert common_prefix(ragged) == expected
    for start in {0, expected}:
        assert lists(ragged.tail(start)) == [row[start:] for row in rows]
    with pytest.raises(ValueError, match="start must be in"):
        ragged.tail(min(map(len, rows)) + 1)
    with pytest.raises(ValueError, match="start must be in"):
        ragged.tail(-1)


@pytest.mark.parametrize("length", [63, 64, 65, 200])
def test_common_prefixes_longer_than_a_block_of_columns(length):
    rows = [[*range(length), 1, i] for i in range(40_000)]
    assert common_prefix(Ragged.of(rows)) == length + 1


def test_no_rows():
    none = Ragged.of([])
    assert common_prefix(none) == 0
    assert lists(none.append([1])) == lists(none.tail(4)) == lists(none[:]) == []
    assert list(none.parts(3)) == [] and none.offsets.tolist() == [0]


@given(ROWS, st.integers(1, 12))
def test_parts_are_cut_greedily(rows, limit):
    parts = list(Ragged.of(rows).parts(limit))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(rows)))
    sizes = [sum(map(len, rows[part])) for part in parts]
    for part, size in zip(parts, sizes, strict=True):
        assert size <= limit or part.stop == part.start + 1
        assert part.stop == len(rows) or size + len(rows[part.stop]) > limit


def test_tensors_share_the_memory():
    ragged = Ragged.of((np.array(VALUES), np.array(OFFSETS)))
    values, offsets = ragged.tensors()
    assert values.tolist() == VALUES and offsets.tolist() == OFFSETS
    assert np.shares_memory(values.numpy(), ragged.values)


@pytest.mark.parametrize(
    ("values", "offsets", "error", "message"),
    [
        (np.arange(3.0), np.array([0, 3]), TypeError, "int32 or int64 and offsets int64"),
        (np.arange(3), np.array([0, 3], np.int32), TypeError, "got int64 and int32"),
        (np.arange(6)[::2], np.array([0, 3]), ValueError, "one contiguous dimension"),
        (np.zeros((2, 2), np.int64), np.array([0, 4]), ValueError, "one contiguous dimension"),
        (np.arange(3), np.array([0, 2]), ValueError, r"number of values \(3\), got 2"),
        (np.arange(3), np.array([1, 3]), ValueError, "offsets must start at 0, got 1"),
        (np.arange(3), np.array([0, 5, 3]), ValueError, "must not fall, got 5 then 3 at row 1"),
        (np.arange(3), np.array([], np.int64), ValueError, "at least the entry 0"),
    ],
)
def test_offsets_that_are_none_are_refused(values, offsets, error, message):
    with pytest.raises(error, match=message):
        Ragged(values, offsets)


# ---- foreign forms, without a copy --------------------------------------------------------------


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
    ragged = Ragged.of(rows)
    assert ragged.values.tolist() == VALUES and ragged.offsets.tolist() == OFFSETS
    assert ragged.offsets.dtype == np.int64
    if memory is not None:
        assert np.shares_memory(ragged.values, memory)
    for form in (rows, ragged):
        [batch] = pack_histories(form, max_tokens=10)
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
            Ragged.of(pa.array(rows))
    with pytest.raises(TypeError, match="Arrow list array"):
        Ragged.of(pa.array([1, 2]))


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
        Ragged.of((torch.empty(3, device="meta", dtype=torch.int64), [0, 3]), "prompts")


def test_unsigned_64_bit_is_refused():
    with pytest.raises(TypeError, match="uint64"):
        Ragged.of((np.array(VALUES, np.uint64), np.array(OFFSETS)))

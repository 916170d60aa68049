"""Copies, pickles and files of an index: an index of its own with the same answers."""

import copy
import io
import multiprocessing
import pickle
import threading

import pytest
import torch
from _support.index_worker import search_in_a_worker
from _support.search_cases import SIMILARITIES

from r2ec_kernels import ItemIndex
from r2ec_kernels.index.scans import copy_kinds

SCANS = ("none", "fp16", "bf16", "int8", "auto")


def through_torch(index):
    file = io.BytesIO()
    torch.save({"index": index}, file)
    file.seek(0)
    return torch.load(file, weights_only=False)["index"]


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda index: pickle.loads(pickle.dumps(index)),
    "pickle protocol 2": lambda index: pickle.loads(pickle.dumps(index, protocol=2)),
    "torch.save": through_torch,
    "in a module": lambda index: copy.deepcopy(Holder(index)).index,
    "in a list, twice": lambda index: copy.deepcopy([index, index])[1],
}


class Holder(torch.nn.Module):
    def __init__(self, index):
        super().__init__()
        self.linear, self.index = torch.nn.Linear(2, 2), index


def make(scan, similarity="dot", dtype=torch.float32):
    items = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = ItemIndex(items, scan=scan, similarity=similarity, temperature=0.5)
    index.remove(torch.arange(0, 50, 7))
    index.append(items[:9] * 2)
    index.write(torch.tensor([3, 4, 301]), items[7:10])
    index.remove(torch.tensor([308]))  # the highest id is gone, and is not used again
    return index


def assert_same(one, other):
    queries = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    a, b = one.search(queries, 11), other.search(queries, 11)
    assert torch.equal(a.scores, b.scores) and torch.equal(a.indices, b.indices)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.items, other.items)
    targets = one.ids[:4]
    a, b = (index.target_stats(queries, targets, use_scan=False) for index in (one, other))
    assert torch.equal(a.rank, b.rank)
    torch.testing.assert_close(a.log_prob, b.log_prob)
    for name in ("similarity", "temperature", "scan", "dim", "dtype", "device"):
        assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("how", sorted(COPIES))
def test_a_copy_answers_alike_and_is_its_own(scan, how):
    for similarity in SIMILARITIES:
        index = make(scan, similarity)
        copied = COPIES[how](index)
        assert type(copied) is ItemIndex and copied._lock is not index._lock
        assert_same(index, copied)
        assert copied.append(torch.ones(1, 12)).tolist() == [309]
        copied.write(torch.tensor([5]), torch.ones(1, 12))
        assert not torch.equal(index.items[5], torch.ones(12)) and len(index) == len(copied) - 1


def test_a_list_keeps_one_index_one():
    index = make("auto")
    first, second = copy.deepcopy([index, index])
    assert first is second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_empty_indexes(dtype):
    for index in (make("auto", dtype=dtype), ItemIndex(torch.empty(0, 12, dtype=dtype))):
        for how in COPIES.values():
            copied = how(index)
            assert copied.dtype == dtype and len(copied) == len(index)
            assert torch.equal(copied.items, index.items)


def test_a_subclass_stays_one():
    class Named(ItemIndex):
        pass

    assert type(copy.deepcopy(Named(torch.ones(3, 2)))) is Named


def test_copied_after_an_interrupted_write(monkeypatch):
    """The copy holds what the index goes back to."""
    index = make("fp16")
    before = index.items
    with monkeypatch.context() as patched:

        def fail(*arguments):
            raise KeyboardInterrupt

        patched.setattr(type(index._storage._state.packed), "write", fail)
        with pytest.raises(KeyboardInterrupt):
            try:
                index.write(torch.tensor([5, 6]), torch.ones(2, 12))
            finally:
                patched.undo()
    assert torch.equal(copy.deepcopy(index).items, before)


@pytest.mark.timeout(120)
def test_a_spawned_worker_takes_an_index():
    index = make("auto")
    queries = torch.randn(2, 12, generator=torch.Generator().manual_seed(2))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=search_in_a_worker, args=(index, queries, results))
    worker.start()
    assert results.get(timeout=100) == index.search(queries, 3).indices.tolist()
    worker.join(20)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_during_writes_is_of_one_moment(how):
    count = 2000
    index = ItemIndex(torch.zeros(count, 8))
    ids, done = torch.arange(count), threading.Event()

    def write():
        number = 0
        while not done.is_set():
            number += 1
            index.write(ids, torch.full((count, 8), float(number)))

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    for _ in range(8):
        rows = COPIES[how](index).items
        assert rows.min() == rows.max()
    done.set()
    writer.join(20)


def test_the_copies_that_auto_keeps_on_a_gpu():
    """int8 codes list most rows of a language model's states: docs/kernels/search.md."""
    assert copy_kinds("auto", torch.device("cuda")) == ("bf16",)
    assert copy_kinds("int8", torch.device("cuda")) == ("int8",)

"""LiveIndex: changes that searches do not wait for, and see whole or not at all."""

from __future__ import annotations

import threading

import pytest
import torch

from r2ec_kernels import ItemIndex, LiveIndex, item_topk


def vectors(count: int, seed: int, d: int = 8) -> torch.Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("copies", [1, 2])
def test_changes_by_hand(copies):
    live = LiveIndex(ItemIndex(torch.eye(3)), copies=copies)
    query = torch.tensor([[3.0, 2.0, 1.0]])
    ids, version = live.change(rows=torch.full((1, 3), 5.0), remove=[0])
    assert (ids.tolist(), version, live.version, len(live)) == ([3], 1, 1, 3)
    with live.snapshot() as (index, found):
        assert found == 1
        assert index.search(query, 4).indices.tolist() == [[3, 1, 2, -1]]
    ids, version = live.change(rows=torch.full((2, 3), 6.0))
    assert (ids.tolist(), version) == ([4, 5], 2)
    live.change(remove=[1, 4])
    with live.snapshot() as (index, found):
        assert found == 3
        assert index.search(query, 4).indices.tolist() == [[5, 3, 2, -1]]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("remove", [[7], [1, 1], [0]])
def test_a_refused_change_leaves_everything(copies, remove):
    live = LiveIndex(ItemIndex(torch.eye(3)), copies=copies)
    live.change(remove=[0])
    with pytest.raises(ValueError, match="remove: expected"):
        live.change(rows=torch.ones(1, 3), remove=remove)
    assert (live.version, len(live)) == (1, 2)
    ids, version = live.change(rows=torch.ones(1, 3))
    assert (ids.tolist(), version) == ([3], 2)


def test_a_held_snapshot_stays_while_changes_go_on():
    live = LiveIndex(ItemIndex(vectors(50, 0)))
    queries = vectors(4, 1)
    with live.snapshot() as (index, version):
        before = index.search(queries, 5)
        live.change(rows=10 * vectors(20, 2), remove=list(range(10)))
        assert version == 0 and live.version == 1
        again = index.search(queries, 5)
        assert again.indices.equal(before.indices) and again.scores.equal(before.scores)
        with live.snapshot() as (newest, found):
            assert found == 1
            assert not newest.search(queries, 5).indices.equal(before.indices)


def test_the_change_after_the_next_waits_for_a_held_snapshot():
    live = LiveIndex(ItemIndex(vectors(5, 0)))
    done = threading.Event()

    def write():
        live.change(rows=vectors(1, 1))
        live.change(rows=vectors(1, 2))
        done.set()

    with live.snapshot() as (index, _):
        thread = threading.Thread(target=write)
        thread.start()
        assert not done.wait(0.2)
        assert len(index) == 5 and live.version == 1
    assert done.wait(10)
    thread.join()
    assert len(live) == 7


@pytest.mark.parametrize("copies", [1, 2])
def test_every_search_sees_one_state(copies):
    """Writers replace all rows of a generation at once; no search may see two generations."""
    rows, searches = 16, 300
    live = LiveIndex(ItemIndex(torch.ones(rows, 4)), copies=copies)
    generation_of = dict.fromkeys(range(rows), 0)
    stop, wrong = threading.Event(), []

    def write():
        ids, generation = torch.arange(rows), 0
        while not stop.is_set():
            generation += 1
            first = int(ids[-1]) + 1
            generation_of.update(dict.fromkeys(range(first, first + rows), generation))
            ids, version = live.change(rows=torch.full((rows, 4), float(generation)), remove=ids)
            if (ids.tolist(), version) != (list(range(first, first + rows)), generation):
                wrong.append((ids, version))

    def read():
        for _ in range(searches):
            with live.snapshot() as (index, version):
                found = index.search(torch.ones(2, 4), rows + 1).indices
            seen = {generation_of[i] for i in found[:, :rows].flatten().tolist()}
            if seen != {version} or found[:, rows].tolist() != [-1, -1]:
                wrong.append((seen, version, found))

    readers = [threading.Thread(target=read) for _ in range(3)]
    writer = threading.Thread(target=write)
    for thread in (*readers, writer):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    writer.join()
    assert not wrong and live.version > 3


def test_many_changes_equal_a_plain_table():
    generator = torch.Generator().manual_seed(5)
    live, table = LiveIndex(ItemIndex(vectors(30, 0))), dict(enumerate(vectors(30, 0)))
    for step in range(60):
        rows = vectors(int(torch.randint(4, (1,), generator=generator)), 100 + step)
        gone = [i for i in table if torch.rand(1, generator=generator) < 0.05]
        ids, _ = live.change(rows=rows if len(rows) else None, remove=gone or None)
        table |= dict(zip(ids.tolist(), rows, strict=True))
        for i in gone:
            del table[i]
        with live.snapshot() as (index, _):
            found = index.search(vectors(3, step), 7)
        places = torch.tensor(list(table))
        expected = item_topk(vectors(3, step), torch.stack(list(table.values())), 7)
        assert found.indices.equal(places[expected.indices])
        assert found.scores.equal(expected.scores)


def test_copies_are_checked():
    with pytest.raises(ValueError, match="copies: expected 1 or 2, got 3"):
        LiveIndex(ItemIndex(torch.eye(2)), copies=3)

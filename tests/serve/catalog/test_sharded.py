"""A table in parts: what it finds is what the whole finds, at one version, whatever happens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from _support.shards import Shards
from _support.toy import toy_dataset, toy_model

from r2ec_fast.serve.catalog.live import LiveCatalog
from r2ec_fast.serve.catalog.sharded import Part, merged
from r2ec_fast.serve.catalog.table import LocalTable, TableMoved
from r2ec_kernels import ItemIndex, TopK

DIM = 8


class Log:
    """The changes that several processes share; each reads on from where it was."""

    def __init__(self, records=None):
        self.records = [] if records is None else records
        self.known = 0

    def __iter__(self):
        return iter(self.news())

    def append(self, record):
        self.records.append(record)
        return self.news()[:-1]

    def news(self):
        new, self.known = self.records[self.known :], len(self.records)
        return new

    def drop_last(self):
        raise AssertionError("no change fails here")

    def close(self):
        """It stays open."""

    def another(self):
        return Log(self.records)


class RowLog(list):
    """Rows of every change, in place of records of items."""


def pair(num_rows, shards, similarity="cosine", seed=0):
    """The same table whole and in parts, and the log of its changes."""
    rows = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(seed))
    log = RowLog()
    held = Shards(ItemIndex(rows, similarity=similarity, temperature=0.1), shards)
    table = held.table(())
    table._rows_since = lambda number: log[number:]
    table.similarity = similarity
    whole = LocalTable(ItemIndex(rows, similarity=similarity, temperature=0.1))
    return whole, table, held, log


def change(tables, log, rows, remove):
    log.append(rows)
    first, second = (table.change(rows, remove) for table in tables)
    assert first == second
    return first


def assert_same(whole, parts, states, k, exclude, include=None):
    def search(table):
        return table.search(states, k, exclude, lambda num_ids: include)

    theirs, other = search(whole)
    try:
        ours, number = search(parts)
    except TableMoved:  # a shard was started again, and has all changes now
        ours, number = search(parts)
    assert number == other and parts.version == whole.version
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.scores, theirs.scores)
    # an index may read log-probabilities of cosines from a 16-bit copy, within 1e-3
    near = 2e-3 if parts.similarity == "cosine" else 5e-5
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0, atol=near)


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
@pytest.mark.parametrize("similarity", ["dot", "cosine", "l2"])
def test_it_finds_what_the_whole_finds_while_rows_come_and_go(shards, similarity):
    random = np.random.default_rng(shards)
    whole, parts, held, log = pair(20, shards, similarity)
    live = list(range(20))
    for step in range(40):
        rows = None
        if random.random() < 0.7:
            rows = torch.from_numpy(random.standard_normal((random.integers(1, 4), DIM))).float()
        gone = random.choice(live, random.integers(0, min(4, len(live))), replace=False).tolist()
        first, _ = change((whole, parts), log, rows, gone)
        live = sorted(set(live) - set(gone) | set(range(first, parts.version.num_ids)))
        if step % 5 == 4:
            held.start_again(int(random.integers(shards)))
        num_ids = parts.version.num_ids
        states = torch.from_numpy(random.standard_normal((3, DIM))).float()
        exclude = [random.choice(num_ids, n, replace=False).tolist() for n in (0, 3, num_ids // 2)]
        mask = torch.from_numpy(random.random(num_ids) < 0.3)
        for include in (None, mask, mask.nonzero()[:, 0], mask & False):
            assert_same(whole, parts, states, int(random.integers(1, 30)), exclude, include)
        ids = random.choice(live, min(3, len(live)), replace=False).tolist()
        assert torch.equal(parts.rows(ids), whole.rows(ids))


def test_equal_rows_come_in_the_order_of_their_ids():
    rows = torch.ones(10, DIM)
    held = Shards(ItemIndex(rows, similarity="dot"), 3)
    table = held.table(())
    table.change(rows[:2], [4])
    hits, _ = table.search(torch.ones(1, DIM), 20, [[2]], lambda _: None)
    assert hits.ids[0].tolist() == [0, 1, 3, 5, 6, 7, 8, 9, 10, 11] + [-1] * 10


def test_new_rows_are_spread_over_the_shards():
    whole, parts, held, log = pair(6, 3)
    for _ in range(6):
        change((whole, parts), log, torch.randn(1, DIM), [])
    assert [len(part.rows([2 * i, 6 + i, 9 + i])) for i, part in enumerate(held.parts)] == [3, 3, 3]


def test_log_probabilities_by_hand():
    # parts with scores (2, 1) and (3): exp(2) / (exp(2) + exp(1)) and 1 are the best rows' shares
    first = Part(
        0,
        TopK(torch.tensor([[2.0, 1.0]]), torch.tensor([[4, 7]])),
        torch.tensor([-math.log(1 + math.exp(-1))]),
    )
    other = Part(
        0, TopK(torch.tensor([[3.0, -math.inf]]), torch.tensor([[9, -1]])), torch.tensor([0.0])
    )
    hits = merged([first, other], 4)
    total = math.log(math.exp(2) + math.exp(1) + math.exp(3))
    assert hits.ids.tolist() == [[9, 4, 7, -1]]
    expected = [3 - total, 2 - total, 1 - total, -math.inf]
    np.testing.assert_allclose(hits.log_probs[0], expected, rtol=1e-6)


def test_shards_that_are_ahead_are_not_mixed_with_others():
    whole, parts, held, log = pair(12, 3)
    rows = torch.ones(1, DIM)
    log.append(rows)
    ahead = held.table(())
    ahead._rows_since = lambda number: log[number:]
    ahead.change(rows, [0])
    with pytest.raises(TableMoved, match="other versions than 0"):
        parts.search(torch.ones(1, DIM), 3, [[]], lambda _: None)
    change((whole, parts), RowLog(), rows, [0])
    assert_same(whole, parts, torch.ones(1, DIM), 3, [[]])


def test_an_answer_is_of_one_version_while_another_process_writes():
    """A change reaches the shards between the calls of a search, at every place in turn."""
    dataset = toy_dataset()
    model = toy_model(dtype=torch.float32).eval()
    model.set_items(model.encode_items(dataset.data.catalog))
    held = Shards(model.index, 3)
    log = Log()
    ours = LiveCatalog(model, dataset.data.catalog, held.table(log), log)
    theirs = LiveCatalog(model, dataset.data.catalog, held.table(log.another()), log.another())
    local = LiveCatalog(model, dataset.data.catalog, LocalTable(model.index))
    states = torch.ones(1, ours.width)
    for place in range(3):
        title = f"item {place}"
        given = [(f"n{place}", {"title": title}), ("i3", {"title": title + " again"})]
        rows = theirs.encode(given)
        calls = []

        def write(method, shard, calls=calls, place=place, given=given, rows=rows):
            calls.append(method)
            if calls.count("search") == place + 1 and method == "search":
                held.between = lambda method, shard: None
                theirs.put(given, rows)

        held.between = write
        (found,), version = ours.search(states, 50, exclude=[[]])
        local.put(given, rows)
        (expected,), newest = local.search(states, 50, exclude=[[]])
        assert version == newest and calls.count("search") > place
        assert (found.ids, found.titles, found.scores) == (
            expected.ids,
            expected.titles,
            expected.scores,
        )
        ours.follow()

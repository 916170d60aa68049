"""Packed half-precision codes: written row by row, multiplied by the block."""

import pytest
import torch
from _support.search_cases import SIMILARITIES

from r2ec_kernels import ItemIndex, item_topk, target_stats
from r2ec_kernels.index import fbgemm
from r2ec_kernels.index.fbgemm import BLOCK, PackedCodes

pytestmark = pytest.mark.skipif(
    not fbgemm.available(torch.device("cpu")), reason="this torch has no FBGEMM"
)


def codes(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)).half()


def assert_holds(store: PackedCodes, want: torch.Tensor) -> None:
    assert len(store) == len(want)
    if not len(want):
        return
    assert torch.equal(store.read(torch.arange(len(want))), want)
    queries = codes(3, 99).float()
    stop = -(-len(want) // 32) * 32
    got = torch.cat(
        [store.multiply(queries, s, min(s + BLOCK, stop)) for s in range(0, stop, BLOCK)], 1
    )
    for found in (got, store.multiply(queries, 0, stop)):
        expected = queries @ want.float().T
        torch.testing.assert_close(found[:, : len(want)], expected, atol=1e-5, rtol=0)


def test_rows_wait_until_their_block_is_packed_again():
    want = codes(2 * BLOCK + 1000, 0)
    store = PackedCodes(8)
    store.write(torch.arange(len(want)), want)
    assert store.waiting == 0
    for seed, count in enumerate((1, 40, 300, 5, 700), start=1):
        at = torch.randperm(len(want), generator=torch.Generator().manual_seed(seed))[:count]
        want[at] = codes(count, seed)
        store.write(at, want[at])
        assert_holds(store, want)
    assert 0 < store.waiting <= 3 * (BLOCK // 16)


def test_growing_and_shrinking():
    want = codes(100, 0)
    store = PackedCodes(8)
    store.write(torch.arange(100), want)  # too few to pack
    assert store._blocks == [None]
    for seed, count in enumerate((500, BLOCK, 30, 2 * BLOCK), start=1):
        rows = codes(count, seed)
        store.write(torch.arange(len(want), len(want) + count), rows)
        want = torch.cat([want, rows])
        assert_holds(store, want)
    for size in (3 * BLOCK - 5, BLOCK, BLOCK - 1, 7, 0):
        store.truncate(size)
        want = want[:size]
        assert len(store) == size and torch.equal(store.read(torch.arange(size)), want)
    store.write(torch.arange(40), codes(40, 9))
    assert_holds(store, codes(40, 9))


def test_a_long_life_of_random_writes_and_truncations():
    generator = torch.Generator().manual_seed(8)
    want, store = codes(0, 0), PackedCodes(8)
    for step in range(60):
        size = len(want)
        if step % 7 == 6:
            size = int(torch.randint(0, size + 1, (1,), generator=generator))
            store.truncate(size)
            want = want[:size]
        elif step % 3 == 0:
            rows = codes(int(torch.randint(1, 3000, (1,), generator=generator)), step)
            store.write(torch.arange(size, size + len(rows)), rows)
            want = torch.cat([want, rows])
        elif size:
            count = int(torch.randint(1, min(size, 400) + 1, (1,), generator=generator))
            at = torch.randperm(size, generator=generator)[:count]
            want[at] = codes(count, step)
            store.write(at, want[at])
        assert_holds(store, want)


def test_float16s_smallest_and_largest_numbers_survive():
    want = torch.full((600, 8), 65504.0).half()
    want[1::3], want[2::3] = 2.0**-24, -(2.0**-14)
    store = PackedCodes(8)
    store.write(torch.arange(600), want)
    queries = torch.eye(8)[:2]
    assert torch.equal(store.multiply(queries, 0, 600), queries @ want.float().T)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_an_index_of_several_blocks_equals_its_table(similarity):
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(20_000, 16, generator=generator) + 3
    queries = torch.randn(5, 16, generator=generator)
    index = ItemIndex(table, similarity=similarity, scan="fp16")

    def check() -> None:
        for k in (1, 2000, 50):
            want = item_topk(queries, table, k, similarity=similarity, impl="reference")
            got = index.search(queries, k)
            assert torch.equal(got.indices, want.indices)
            assert torch.equal(got.scores, want.scores)

    check()
    for count in (3, 900, 8000):
        at = torch.randperm(20_000, generator=generator)[:count]
        table[at] = torch.randn(count, 16, generator=generator) + 3
        index.write(at, table[at])
        check()
        assert index.last_search.scan == "fp16" and index.last_search.dense_rows == 0
    assert index.last_search.candidates_per_k < 4


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_target_stats_by_the_scan(similarity, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    table = torch.nn.functional.normalize(torch.randn(20_000, 64, generator=generator) + 1)
    queries = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator) + 1)
    targets = torch.randint(0, 20_000, (40,), generator=generator)
    multiplied = []
    multiply = PackedCodes.multiply
    monkeypatch.setattr(PackedCodes, "multiply", lambda *a: multiplied.append(a[2]) or multiply(*a))
    how = {"similarity": similarity, "temperature": 0.2}
    index = ItemIndex(table, **how, scan="fp16")
    for batch in (1, 40):
        multiplied.clear()
        got = index.target_stats(queries[:batch], targets[:batch])
        assert multiplied
        want = target_stats(queries[:batch], table, targets[:batch], **how, impl="reference")
        assert torch.equal(got.rank, want.rank)
        torch.testing.assert_close(got.log_prob, want.log_prob, atol=1e-3, rtol=0)
    multiplied.clear()
    index.target_stats(queries, targets, use_scan=False)
    assert not multiplied
    sharp = ItemIndex(table, similarity=similarity, temperature=1e-4, scan="fp16")
    got = sharp.target_stats(queries, targets)
    assert not multiplied  # too sharp for float16: the rows themselves
    how["temperature"] = 1e-4
    want = target_stats(queries, table, targets, **how, impl="reference")
    assert torch.equal(got.rank, want.rank)
    torch.testing.assert_close(got.log_prob, want.log_prob, atol=1e-2, rtol=1e-5)


def test_fp16_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(fbgemm, "available", lambda device: False)
    with pytest.raises(ValueError, match="scan: 'fp16' needs a CPU whose torch has FBGEMM"):
        ItemIndex(torch.eye(3), scan="fp16")
    index = ItemIndex(torch.eye(3))
    assert index.search(torch.eye(3), 1).indices.tolist() == [[0], [1], [2]]

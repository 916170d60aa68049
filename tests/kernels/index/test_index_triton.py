"""ItemIndex searched by the Triton kernel: on a GPU and in Triton's interpreter, bit for bit."""

import pytest
import torch
from _support.search_cases import KINDS, SIMILARITIES, assert_same, make, make_exclude

from r2ec_kernels import ItemIndex, item_topk, target_stats
from r2ec_kernels.index import files

INTERPRETED_TYPES = ("float32", "bfloat16")  # there the kernel multiplies in float32
INTERPRETED_SHARE = 3
SCANS = ("none", "bf16", "int8")


@pytest.fixture(autouse=True)
def kernel(device, monkeypatch):
    """What an index does by itself on a GPU."""
    if device == "cpu":
        monkeypatch.setenv("R2EC_IMPL", "triton")


def assert_searches_like_a_table(index, queries, k=6, exclude=None):
    """Ids of an index without removals below the highest live one, or any: by public means."""
    ids = index.ids
    how = {"similarity": index.similarity, "temperature": index.temperature}
    hidden = None
    if exclude is not None:
        position = torch.full((int(ids.max()) + 1,), -1, device=ids.device)
        position[ids] = torch.arange(len(ids), device=ids.device)
        hidden = torch.where(exclude < 0, -1, position[exclude.clamp(min=0)])
    want = item_topk(queries, index.items[ids], k, **how, exclude=hidden, impl="reference")
    named = torch.where(want.indices < 0, -1, ids[want.indices.clamp_min(0)])
    assert_same(index.search(queries, k, exclude=exclude), (want.scores, named))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_copy_finds_the_same(kind, scan, device):
    for similarity in SIMILARITIES:
        problem = make(kind, 3, 260, 24, 5)
        how = {"similarity": similarity, "temperature": 0.02}
        index = ItemIndex(problem.items.to(device), scan=scan, **how)
        exclude = make_exclude(3, 260, 6, 5).to(device)
        assert_searches_like_a_table(index, problem.queries.to(device), 4, exclude)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("scan", SCANS)
def test_a_life_of_writes_appends_and_removals(scan, similarity, device, dtype):
    problem = make("normal", 3, 400, 24, 3, dtype)
    queries = problem.queries.to(device)
    index = ItemIndex(problem.items.to(device), similarity=similarity, scan=scan)
    for step in range(3):
        fresh = make("normal", 1, 60, 24, 10 + step, dtype).items.to(device)
        index.write(index.ids[::5][:60], fresh[: len(index.ids[::5][:60])] * 2)
        assert_searches_like_a_table(index, queries)
        added = index.append(fresh)
        assert added.tolist() == list(range(400 + 60 * step, 460 + 60 * step))
        index.remove(index.ids[step::9])
        assert_searches_like_a_table(index, queries)
    index.remove(index.ids)
    assert len(index) == 0 and (index.search(queries, 3).indices == -1).all()
    assert index.append(problem.items[:1].to(device)).tolist() == [580]
    assert index.search(queries, 2).indices.tolist() == [[580, -1]] * 3


@pytest.mark.parametrize("scan", SCANS)
def test_the_kernel_answers_and_says_so(scan, device, dtype):
    """No query of a normal table takes the dense path."""
    count, k = (700, 9) if device == "cpu" else (200_000, 10)
    problem = make("normal", 4, count, 40, 6, dtype)
    index = ItemIndex(problem.items.to(device), scan=scan)
    assert_searches_like_a_table(index, problem.queries.to(device), k)
    stats = index.last_search
    assert stats.scan == f"triton {scan}" and stats.queries == 4 and stats.dense_rows == 0


@pytest.mark.gpu
@pytest.mark.parametrize("scan", ["auto", *SCANS])
@pytest.mark.parametrize(
    ("batch", "count", "dim", "k"),
    [(1, 200_001, 128, 10), (17, 100_003, 576, 100), (65, 50_001, 1000, 7)],
)
def test_large(batch, count, dim, k, scan, device, dtype):
    problem = make("shared mean", batch, count, dim, 8, dtype)
    index = ItemIndex(problem.items.to(device), similarity="cosine", temperature=0.05, scan=scan)
    exclude = make_exclude(batch, count, 40, 8).to(device)
    assert_searches_like_a_table(index, problem.queries.to(device), k, exclude)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("kind", ["normal", "90% copies", "near ties", "row scales"])
def test_target_stats(kind, scan, device):
    problem = make(kind, 6, 420, 24, 11)
    queries, items = problem.queries.to(device), problem.items.to(device)
    targets = torch.randint(0, 420, (6,), generator=torch.Generator().manual_seed(1)).to(device)
    exclude = make_exclude(6, 420, 12, 11).to(device)
    exclude[:3, 0] = targets[:3]
    how = {"similarity": "cosine", "temperature": 0.5}
    got = ItemIndex(items, scan=scan, **how).target_stats(queries, targets, exclude=exclude)
    want = target_stats(queries, items, targets, **how, exclude=exclude, impl="reference")
    assert torch.equal(got.rank, want.rank)
    torch.testing.assert_close(got.log_prob, want.log_prob, atol=1e-3, rtol=1e-6)


def test_save_and_load(tmp_path, device, dtype):
    problem = make("normal", 3, 300, 12, 7, dtype)
    index = ItemIndex(problem.items.to(device), similarity="cosine", scan="int8")
    index.remove(torch.tensor([5, 299], device=device))
    index.save(tmp_path / "index.safetensors")
    again = ItemIndex.load(tmp_path / "index.safetensors", device=device)
    assert again.device.type == device and len(again) == 298
    assert_searches_like_a_table(again, problem.queries.to(device), 4)


@pytest.mark.parametrize("dim", [1, 20, 33, 64])
def test_rows_have_zero_columns_behind_them(dim, device, dtype):
    """So that kernels load 16 bytes at once, whatever d is; nothing else shows it."""
    from r2ec_kernels.topk.impl.triton.wide import _takes_tma

    problem = make("normal", 3, 150, dim, 4, dtype)
    index = ItemIndex(problem.items.to(device), scan="none")
    storage = index._storage

    def check() -> None:
        rows = storage.aligned_rows()
        assert rows.shape == (len(index), -(-dim // 16) * 16) and rows.stride(0) % 16 == 0
        assert _takes_tma(rows) and not rows[:, dim:].any()
        assert torch.equal(rows[:, :dim], storage.live("rows"))

    check()
    fresh = make("normal", 1, 90, dim, 5, dtype).items.to(device)
    index.write(index.ids[:9], fresh[:9])
    index.append(fresh)  # more than there is room for
    check()
    index.remove(index.ids[::7])
    check()
    index.remove(index.ids)
    index.append(fresh[:2])
    check()


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_columns_behind_change_no_bit(similarity, device, dtype, monkeypatch, tmp_path):
    """Rows, norms, saved files and results are those of an index without them."""
    problem = make("row scales", 4, 300, 21, 6, dtype)
    made = [ItemIndex(problem.items.to(device), similarity=similarity, scan="none")]
    monkeypatch.setenv("R2EC_IMPL", "torch")
    made.append(ItemIndex(problem.items, similarity=similarity, scan="none"))
    monkeypatch.setenv("R2EC_IMPL", "triton" if device == "cpu" else "auto")
    wide, narrow = (index._storage for index in made)
    assert (wide.aligned_rows().shape[1], narrow.aligned_rows().shape[1]) == (32, 21)
    for number, index in enumerate(made):
        index.write([3, 5], problem.items[7:9].to(index.device))
        index.save(tmp_path / str(number))
    assert torch.equal(wide.live("norm").cpu(), narrow.live("norm"))
    assert torch.equal(made[0].items.cpu(), made[1].items) and made[0].dim == 21
    (_, *saved), (_, *other) = (files.read_index(tmp_path / name) for name in ("0", "1"))
    assert all(map(torch.equal, saved[:2], other[:2])) and saved[2] == other[2]
    queries, targets = problem.queries.to(device), torch.arange(4)
    found = made[0].search(queries, 4)
    stats = made[0].target_stats(queries, targets.to(device))
    copied = made[0].items
    assert_same(found, item_topk(queries, copied, 4, similarity=similarity, impl="reference"))
    want = target_stats(queries, copied, targets.to(device), similarity=similarity)
    assert torch.equal(stats.rank, want.rank)


@pytest.mark.interpreter
def test_an_index_on_a_cpu_keeps_rows_side_by_side(device, monkeypatch):
    for name in ("", "torch"):
        monkeypatch.setenv("R2EC_IMPL", name)
        index = ItemIndex(torch.ones(40, 20), scan="none")
        assert index._storage.live("rows").is_contiguous()

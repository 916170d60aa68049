"""ItemIndex: writing, statistics, files, threads."""

import threading

import pytest
import torch
from _support.search_cases import KINDS, SIMILARITIES, assert_same, make, make_exclude

from r2ec_kernels import ItemIndex, item_topk, target_stats

SCANS = ("none", "fp16", "bf16", "int8")


def rows_of(index: ItemIndex) -> tuple[torch.Tensor, torch.Tensor]:
    """Live ids and their rows, by public means."""
    return index.ids, index.items[index.ids]


def assert_searches_like_a_table(index, queries, k=8):
    ids, rows = rows_of(index)
    how = {"similarity": index.similarity, "temperature": index.temperature}
    want = item_topk(queries, rows, k, **how, impl="reference")
    got = index.search(queries, k)
    named = torch.where(want.indices < 0, -1, ids[want.indices.clamp_min(0)]) if len(ids) else -1
    assert (got.indices == named).all()
    assert torch.equal(got.scores, want.scores)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_life_of_writes_appends_and_removals(scan, similarity):
    generator = torch.Generator().manual_seed(3)
    items = torch.randn(1500, 24, generator=generator)
    queries = torch.randn(4, 24, generator=generator)
    index = ItemIndex(items, similarity=similarity, scan=scan)
    model = dict(enumerate(items))  # what the index should hold
    next_id = 1500
    for step in range(12):
        alive = torch.tensor(sorted(model))
        some = alive[torch.randperm(len(alive), generator=generator)[:200]]
        fresh = torch.randn(200, 24, generator=generator) * 2.0 ** (step - 6)
        if step % 3 == 0:
            index.write(some, fresh)
            model.update(zip(some.tolist(), fresh, strict=True))
        elif step % 3 == 1:
            added = index.append(fresh)
            assert added.tolist() == list(range(next_id, next_id + 200))
            model.update(zip(added.tolist(), fresh, strict=True))
            next_id += 200
        else:
            index.remove(some)
            for number in some.tolist():
                del model[number]
        assert len(index) == len(model) and index.ids.tolist() == sorted(model)
        assert torch.equal(index.items[index.ids], torch.stack([model[i] for i in sorted(model)]))
        assert_searches_like_a_table(index, queries)


def test_empty_and_emptied():
    index = ItemIndex(torch.empty(0, 4), scan="int8")
    queries = torch.ones(2, 4)
    assert (index.search(queries, 3).indices == -1).all()
    assert index.append(torch.eye(4)).tolist() == [0, 1, 2, 3]
    index.remove(torch.tensor([3, 0, 2, 1]))
    assert len(index) == 0 and (index.search(queries, 3).indices == -1).all()
    assert index.append(torch.eye(4)[:1]).tolist() == [4]
    assert index.search(queries, 2).indices.tolist() == [[4, -1]] * 2


def test_the_last_of_repeated_writes_counts():
    index = ItemIndex(torch.zeros(4, 3))
    index.write(torch.tensor([2, 1, 2]), torch.tensor([[1.0] * 3, [2.0] * 3, [3.0] * 3]))
    assert index.items[:, 0].tolist() == [0, 2, 3, 0]


@pytest.mark.parametrize("scan", ["none", "fp16", "int8"])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"huge", "wild scales"}))
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_target_stats(kind, similarity, scan):
    problem = make(kind, 6, 2100, 24, 11)
    exclude = make_exclude(6, 2100, 20, 11)
    targets = torch.randint(0, 2100, (6,), generator=torch.Generator().manual_seed(1))
    exclude[:3, 0] = targets[:3]  # a target competes even where it is excluded
    how = {"similarity": similarity, "temperature": 0.5}
    index = ItemIndex(problem.items, **how, scan=scan)
    got = index.target_stats(problem.queries, targets, exclude=exclude)
    want = target_stats(
        problem.queries, problem.items, targets, **how, exclude=exclude, impl="reference"
    )
    assert torch.equal(got.rank, want.rank)
    torch.testing.assert_close(got.log_prob, want.log_prob, atol=1e-3, rtol=1e-6)
    top = index.search(problem.queries, 2100)
    position = (top.indices == targets[:, None]).nonzero()[:, 1] + 1
    assert torch.equal(index.target_stats(problem.queries, targets).rank, position)


def test_target_stats_after_removals():
    problem = make("90% copies", 5, 600, 12, 5)
    index = ItemIndex(problem.items)
    index.remove(torch.arange(0, 600, 3))
    ids, rows = rows_of(index)
    targets = ids[torch.tensor([0, 5, 100, 399, 7])]
    got = index.target_stats(problem.queries, targets)
    want = target_stats(problem.queries, rows, torch.tensor([0, 5, 100, 399, 7]))
    assert torch.equal(got.rank, want.rank)
    with pytest.raises(ValueError, match="targets: expected ids in the index, got 3"):
        index.target_stats(problem.queries, torch.tensor([1, 2, 3, 4, 5]))


@pytest.mark.parametrize("scan", SCANS)
def test_many_queries_may_exclude_what_was_removed(scan):
    generator = torch.Generator().manual_seed(6)
    index = ItemIndex(torch.randn(2000, 40, generator=generator), scan=scan)
    queries = torch.randn(20, 40, generator=generator)
    best = index.search(queries, 2).indices
    removed = best[:, 0].unique()
    index.remove(removed)
    want = index.search(queries, 5)
    assert_same(index.search(queries, 5, exclude=removed.expand(20, -1)), want)


def test_last_search_tells_what_happened():
    problem = make("shared mean", 4, 20_000, 64, 6)
    index = ItemIndex(problem.items, scan="int8")
    assert index.last_search is None
    index.search(problem.queries, 10)
    stats = index.last_search
    assert stats.scan != "dense" and stats.queries == 4 and stats.dense_rows == 0
    assert 1 <= stats.candidates_per_k < 40
    ItemIndex(problem.items, scan="none").search(problem.queries, 10)
    equal = ItemIndex(problem.items[:1].expand(20_000, -1))
    equal.search(problem.queries, 10)
    assert equal.last_search.dense_rows == 4 and equal.last_search.scan != "int8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path, dtype):
    problem = make("normal", 3, 300, 12, 7, dtype)
    index = ItemIndex(problem.items, similarity="cosine", temperature=0.02, scan="int8")
    index.remove(torch.tensor([5, 299]))
    index.save(tmp_path / "index.safetensors")
    again = ItemIndex.load(tmp_path / "index.safetensors")
    assert (again.similarity, again.temperature, again.scan) == ("cosine", 0.02, "int8")
    assert torch.equal(again.items[:299], index.items[:299]) and len(again) == 298
    assert_searches_like_a_table(again, problem.queries)
    assert again.append(problem.items[:1]).tolist() == [300]
    assert [path.name for path in tmp_path.iterdir()] == ["index.safetensors"]


def test_the_file_is_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    index = ItemIndex(torch.eye(3))
    index.save(tmp_path / "index.safetensors")
    tensors = safetensors.load_file(tmp_path / "index.safetensors")
    assert torch.equal(tensors["rows"], torch.eye(3)) and tensors["ids"].tolist() == [0, 1, 2]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "index.safetensors"
    ItemIndex(torch.eye(8)).save(path)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    flipped = bytearray(good)
    flipped[-3] ^= 1
    foreign = good.replace(b"r2ec_kernels.ItemIndex", b"r2ec_kernels.SomeOther")
    for damaged, words in (
        (good[:-1], "truncated"),
        (good + b"x", "truncated"),
        (bytes(flipped), "checksum"),
        (good[: header - 5], "damaged|truncated"),
        (good[:4], "safetensors|damaged"),
        (b"", "safetensors"),
        (b"PK\x03\x04" + bytes(100), "safetensors|damaged"),
        (foreign, "expected an ItemIndex file"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            ItemIndex.load(path)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda i: i.write(torch.tensor([9]), torch.ones(1, 3)), ValueError, "ids.*got 9"),
        (lambda i: i.write(torch.tensor([-1]), torch.ones(1, 3)), ValueError, "ids.*got -1"),
        (lambda i: i.write(torch.tensor([1]), torch.ones(2, 3)), ValueError, "ids"),
        (lambda i: i.write(torch.tensor([1]), torch.ones(1, 4)), ValueError, "rows"),
        (lambda i: i.write(torch.tensor([1]), torch.ones(1, 3).half()), TypeError, "rows"),
        (lambda i: i.append(torch.full((1, 3), torch.nan)), ValueError, "rows.*row 0"),
        (lambda i: i.remove(torch.tensor([1, 1])), ValueError, "distinct"),
        (lambda i: i.remove(torch.tensor([1.0])), TypeError, "ids"),
        (lambda i: i.search(torch.ones(1, 4), 1), ValueError, "queries"),
        (lambda i: i.search(torch.ones(1, 3), -1), ValueError, "k"),
        (lambda i: ItemIndex(torch.ones(2, 2), scan="int4"), ValueError, "scan"),
        (lambda i: ItemIndex(torch.tensor([[0.0], [torch.inf]])), ValueError, "row 1"),
        (lambda i: ItemIndex(torch.ones(2, 2), similarity="max"), ValueError, "similarity"),
    ],
)
def test_bad_calls_leave_the_index_alone(call, error, words):
    index = ItemIndex(torch.eye(3))
    with pytest.raises(error, match=words):
        call(index)
    assert torch.equal(index.items, torch.eye(3)) and len(index) == 3


@pytest.mark.parametrize("scan", SCANS)
def test_a_write_is_seen_whole_or_not_at_all(scan):
    """Every write gives all rows one common value; no search may see two."""
    count, writes = 4000, 30
    index = ItemIndex(torch.full((count, 8), 1.0), scan=scan)
    ids, queries = torch.arange(count), torch.ones(2, 8)
    torn, done = [], threading.Event()

    def search() -> None:
        while not done.is_set():
            scores = index.search(queries, 50).scores
            if scores.min() != scores.max():
                torn.append(scores)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(writes):
        index.write(ids, torch.full((count, 8), float(number % 5)))
    done.set()
    for thread in threads:
        thread.join()
    assert not torn

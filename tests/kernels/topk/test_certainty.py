"""How a search on a GPU becomes certain: what is listed, and what happens where a list overflows.

At the sizes that matter the interpreter is too slow for the scan's products: torch makes them there
(``_support.scan_stand_in``), and the other kernels run.
"""

import pytest
import torch
from _support.scan_stand_in import count_lists, stand_in, use_stand_in
from _support.search_cases import KINDS, SIMILARITIES, assert_same, make, make_exclude

from r2ec_kernels import ItemIndex, item_topk

INTERPRETED_SHARE = 2

INTERPRETED_TYPES = ("float32",)
SCANS = ("none", "bf16", "int8")


@pytest.fixture(autouse=True)
def on_the_triton_path(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setenv("R2EC_IMPL", "triton")


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_lists_that_overflow(kind, similarity, device, monkeypatch):
    """Every query's list overflows, and the room for its best keys does so again and again."""
    from r2ec_kernels.topk.impl.triton import candidates

    k = 3
    monkeypatch.setattr(candidates, "capacity_of", lambda *sizes: k + 33)
    problem = make(kind, 3, 420, 20, 5)
    queries, items = problem.queries.to(device), problem.items.to(device)
    exclude = make_exclude(3, 420, 9, 5).to(device)
    index = ItemIndex(items, similarity=similarity, temperature=0.1)
    want = item_topk(
        queries, items, k, similarity=similarity, temperature=0.1, exclude=exclude, impl="reference"
    )
    assert_same(index.search(queries, k, exclude=exclude), want)


@pytest.mark.parametrize("ascending", [True, False])
def test_a_full_list_is_searched_for_its_best(ascending, device, monkeypatch):
    """Each row pushes out one before it, or the best come first and have to stay."""
    from r2ec_kernels.topk.impl.triton import candidates

    monkeypatch.setattr(candidates, "capacity_of", lambda *sizes: 40)
    items = torch.arange(1, 901, device=device, dtype=torch.float32)[:, None] / 900
    items = items if ascending else items.flip(0)
    queries = torch.tensor([[1.0], [-1.0], [1e-30], [float("nan")]], device=device)
    found = item_topk(queries, items, 5, impl="triton")
    assert_same(found, item_topk(queries, items, 5, impl="reference"))
    best = [899, 898, 897, 896, 895] if ascending else [0, 1, 2, 3, 4]
    assert found.indices[0].tolist() == best


def tables(kind: str, count: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and rows: random, or around a mean that all share (cosine 0.96), as a language
    model's states are."""
    generator = torch.Generator().manual_seed(count + d)
    rows = torch.randn(count + 6, d, generator=generator)
    if kind == "shared mean":
        rows += 4.9 * torch.randn(d, generator=generator)
    return rows[:6].contiguous(), rows[6:].contiguous()


@pytest.mark.interpreter
def test_the_stand_in_is_what_the_kernel_leaves(device, monkeypatch):
    """Exact results follow from either; here both leave the same best rows of every group."""
    from r2ec_kernels._scan.triton_queries import prepare_on_device
    from r2ec_kernels.topk.impl.triton.groups import scan_rows
    from r2ec_kernels.topk.impl.triton.scan import group_best

    queries, rows = tables("random", 300, 24)
    scanned = scan_rows(rows, "l2")
    operand = prepare_on_device(queries, "l2", 1.0, torch.float32).operand
    ours = group_best(scanned, operand, 32, None, None)
    theirs = stand_in(scanned, operand, 32, None, None)
    assert torch.equal(ours.first & 31, theirs.first & 31)
    assert torch.equal(ours.second & 31, theirs.second & 31)
    assert torch.allclose(ours.limits[2], theirs.limits[2], rtol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("type_of_rows", ["float32", "bfloat16"])
def test_rows_of_a_plain_table_that_share_a_direction(type_of_rows, similarity, device):
    """Their bound is relative to what they do not share: a few rows a result. Without that, queries
    of float32 beside rows of bfloat16 list every row."""
    from r2ec_kernels._scan.triton_queries import prepare_on_device
    from r2ec_kernels.topk.impl.triton import candidates
    from r2ec_kernels.topk.impl.triton.direction import prepare_rows
    from r2ec_kernels.topk.impl.triton.groups import scan_rows

    k, d = 10, 512
    queries, rows = tables("shared mean", 10_000, d)
    rows = rows.to(getattr(torch, type_of_rows))

    def listed(scanned, query) -> torch.Tensor:
        found = stand_in(scanned, query.operand, 32, None, None)
        lists = candidates.reach(found, scanned, query, k, 32, 4096)
        return lists.count[:, 0] + 32 * lists.count[:, 1]

    assert (listed(*prepare_rows(rows, queries, similarity, 1.0)) <= 20 * k).all()
    if type_of_rows == "bfloat16":
        query = prepare_on_device(queries, similarity, 1.0, rows.dtype)
        wide = listed(scan_rows(rows, similarity), query)
        assert wide.float().mean() >= (300 if similarity == "dot" else 9000)


@pytest.mark.interpreter
def test_a_direction_is_taken_where_there_is_one(device):
    from r2ec_kernels.topk.impl.triton.direction import shared_direction

    _, shared = tables("shared mean", 3000, 24)
    _, random = tables("random", 3000, 24)
    for similarity in ("dot", "cosine"):
        *direction, middle = shared_direction(shared, similarity)
        direction = torch.stack(direction)
        along = shared @ direction
        if similarity == "cosine":
            along /= torch.linalg.vector_norm(shared, dim=1)
        assert abs(float(torch.linalg.vector_norm(direction)) - 1) < 1e-6
        assert abs(float(along.mean() - middle)) < 0.02 * float(along.mean())
        for table in (random, shared[:0], shared * 0, torch.full_like(shared, float("nan"))):
            assert not shared_direction(table, similarity).any()
    shared[4, 3] = float("inf")  # of every second row, which are looked at
    assert not shared_direction(shared, "dot").any()


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["random", "shared mean"])
@pytest.mark.parametrize(
    ("count", "d", "k", "scan"),
    [
        *((100_000, 128, 10, scan) for scan in SCANS),
        *((200_000, 64, 100, scan) for scan in SCANS),
        *((100_000, 128, 1000, scan) for scan in SCANS),
        *((200_000, 64, 1000, scan) for scan in SCANS),
    ],
)
def test_no_query_is_searched_densely(count, d, k, kind, scan, device, monkeypatch):
    use_stand_in(monkeypatch, d)
    queries, rows = tables(kind, count, d)
    queries = queries[: 3 if k == 1000 else 6]
    index = ItemIndex(rows, scan=scan)
    found = index.search(queries, k)
    assert index.last_search.dense_rows == 0, index.last_search
    assert_same(found, item_topk(queries, rows, k, impl="torch"))


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["random", "shared mean"])
@pytest.mark.parametrize(
    ("count", "d", "k", "scan"),
    [
        *((64_000, 64, 1000, scan) for scan in SCANS),
        (128_000, 64, 2000, "none"),
        (100_000, 128, 1000, "int8"),
        pytest.param(100_000, 576, 1000, "bf16", marks=pytest.mark.slow),
    ],
)
def test_lists_of_a_large_batch_have_room(count, d, k, kind, scan, device, monkeypatch):
    """Of the groups that hold a result 18% (N = 100 k) to 31% (64 k) hold another, even if scores
    are exact, and the rows of all of them are listed."""
    queries, rows = tables(kind, count, d)
    index = ItemIndex(rows, scan=scan)
    lists = count_lists(monkeypatch, batch=1024)
    index.search(queries, k)
    assert (lists[0].rows <= lists[0].capacity).all(), lists

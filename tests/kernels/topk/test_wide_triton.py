"""The scans for many queries: what they leave of every group, and the searches that they serve.

``wide`` lets a few queries take them, so that the interpreter is fast enough.
"""

import json

import pytest
import torch
from _support.search_cases import SIMILARITIES, assert_same, make, make_exclude

from r2ec_kernels import ItemIndex, item_topk

INTERPRETED_TYPES = ("float32", "bfloat16")  # products are widened; float16 has a case below
INTERPRETED_SHARE = 8
SCANS = ("fused", "cublas")
BATCH = 5


@pytest.fixture(params=SCANS)
def wide(request, device, monkeypatch) -> str:
    """Every search takes this scan."""
    from r2ec_kernels.topk.impl.triton import launch

    if device == "cpu":
        monkeypatch.setenv("R2EC_IMPL", "triton")
    monkeypatch.setenv("R2EC_SEARCH_WIDE", request.param)
    table = launch.candidates
    monkeypatch.setattr(launch, "candidates", lambda batch, *args: table(1024, *args))
    return request.param


def scores_of(scanned, operand, by_norm) -> torch.Tensor:
    """The scores of a scan by torch: float64 [B, N]."""
    codes = scanned.codes[:, : operand.shape[1]].double()
    scores = operand.double() @ codes.T
    if scanned.mul is not None:
        scores = scores * scanned.mul
    if scanned.sub is not None:
        scores = scores - scanned.sub
    norms = torch.linalg.vector_norm(codes, dim=1)
    if by_norm == "cosine":
        scores = scores / norms
    return scores - 0.5 * norms**2 if by_norm == "l2" else scores


def rows_of(groups: int, group: int, span: int) -> torch.Tensor:
    """Rows [groups, group] in the order of their places: ``groups.row_of`` in words.

    A span of 8 rows in turn: every group has the next WIDTH of them.
    """
    share = span // group
    spans = torch.arange(groups // share * span).view(-1, span // 8, share, 8 // share)
    return spans.transpose(1, 2).reshape(groups, group)


def check_groups(found, group, scores, hidden=None) -> None:
    """first and second are the two best of every group, rounded down, with the best row's place."""
    batch, count = scores.shape
    groups = found.first.shape[1]
    assert found.second.shape == (batch, groups) and groups * group >= count
    rows = rows_of(groups, group, found.span).to(scores.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    padded = torch.nn.functional.pad(scores, (0, groups * group - count), value=float("-inf"))
    held = padded[:, rows.flatten()].view(batch, groups, group)
    scale = scores.nan_to_num(neginf=0.0).abs().max()
    best = held.topk(2, dim=2).values
    for packed, want in ((found.first, best[..., 0]), (found.second, best[..., 1])):
        missing = want == float("-inf")
        assert torch.equal(packed == -(2**31), missing)
        bits = packed & -group
        score = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32).double()
        assert ((score - want)[~missing].abs() <= 2**-14 * scale).all()
        at = held.gather(2, (packed & (group - 1)).long()[..., None])[..., 0]
        assert ((at - want)[~missing].abs() <= 2**-14 * scale).all()


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("count", "d"), [(1, 1), (300, 24), (517, 31)])
def test_the_two_best_of_every_group(count, d, similarity, group, wide, device, dtype):
    """Odd sizes, rows behind the last one, excluded pairs, and norms that the scan takes."""
    from r2ec_kernels._scan.triton_exclusions import exclusions
    from r2ec_kernels.topk.impl.triton.groups import scan_rows
    from r2ec_kernels.topk.impl.triton.scan import group_best

    problem = make("normal", BATCH, count, d, count, dtype)
    items, operand = problem.items.to(device), problem.queries.to(device)
    scanned = scan_rows(items, similarity)
    scores = scores_of(scanned, operand, scanned.by_norm)
    found = group_best(scanned, operand, group)
    check_groups(found, group, scores)
    largest = torch.linalg.vector_norm(items.double(), dim=1).max().float()
    assert torch.allclose(found.limits[2], largest, rtol=1e-6)
    exclude = make_exclude(BATCH, count, 9, 1).to(device)
    given = exclusions(exclude, BATCH, count, items.device)
    hidden = torch.zeros(BATCH, count + 1, dtype=torch.bool, device=device)
    hidden.scatter_(1, exclude.where(exclude >= 0, torch.full_like(exclude, count)), True)
    check_groups(group_best(scanned, operand, group, given), group, scores, hidden[:, :count])


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("scan", ["tiles", *SCANS])
@pytest.mark.parametrize("d", [24, 31])
def test_what_rows_share_is_given_back(d, scan, similarity, device, dtype, monkeypatch):
    """Scores but for t, and the largest distance from t c, from every scan."""
    from r2ec_kernels.topk.impl.triton import launch
    from r2ec_kernels.topk.impl.triton.direction import prepare_rows
    from r2ec_kernels.topk.impl.triton.scan import group_best

    if scan != "tiles":
        monkeypatch.setenv("R2EC_SEARCH_WIDE", scan)
        table = launch.candidates
        monkeypatch.setattr(launch, "candidates", lambda batch, *args: table(1024, *args))
    problem = make("shared mean", BATCH, 300, d, 3, dtype)
    items, queries = problem.items.to(device), problem.queries.to(device) + 3
    scanned, query = prepare_rows(items, queries, similarity, 1.0)
    direction, middle = scanned.direction[:-1].double(), scanned.direction[-1].double()
    assert middle > 0
    found = group_best(scanned, query.operand, 32)
    rows = items.double()
    length = torch.linalg.vector_norm(rows, dim=1) if similarity == "cosine" else 1.0
    scores = (query.operand.double() @ rows.T + direction @ rows.T) / length - middle
    check_groups(found, 32, scores)
    rows = rows / length[:, None] if similarity == "cosine" else rows
    far = torch.linalg.vector_norm(rows - middle * direction, dim=1).max()
    assert far <= found.limits[0] <= 1.1 * far + 0.02 * middle


@pytest.mark.parametrize("group", [32, 128])
def test_codes_with_factors_of_their_own(group, wide, device):
    from r2ec_kernels.topk.impl.triton.groups import Scanned
    from r2ec_kernels.topk.impl.triton.scan import group_best

    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (401, 64), generator=generator).to(torch.int8)
    mul, sub = torch.rand(2, 401, generator=generator) + 0.5
    operand = torch.randn(BATCH, 64, generator=generator).bfloat16().to(device)
    limits = torch.zeros(3, device=device)
    scanned = Scanned(codes.to(device), mul.to(device), sub.to(device), coded=True, limits=limits)
    found = group_best(scanned, operand, group)
    check_groups(found, group, scores_of(scanned, operand, "none"))
    assert found.limits is limits


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("kind", ["90% copies", "near ties", "row scales"])
def test_a_search_equals_the_reference(kind, similarity, wide, device, dtype):
    problem = make(kind, BATCH, 450, 40, 7, dtype)
    queries, items = problem.queries.to(device), problem.items.to(device)
    exclude = make_exclude(BATCH, 450, 12, 7).to(device)
    given = {"similarity": similarity, "temperature": 0.1, "exclude": exclude}
    want = item_topk(queries, items, 6, impl="reference", **given)
    assert_same(item_topk(queries, items, 6, impl="triton", **given), want)


@pytest.mark.parametrize("scan", ["none", "bf16", "int8"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_an_index_equals_the_reference(similarity, scan, wide, device):
    """Norms that are known, low-precision copies, ids apart from rows."""
    problem = make("row scales", BATCH, 500, 33, 9)
    queries, items = problem.queries.to(device), problem.items.to(device)
    index = ItemIndex(items, similarity=similarity, temperature=0.5, scan=scan)
    exclude = make_exclude(BATCH, 500, 12, 9).to(device)
    want = item_topk(
        queries, items, 5, similarity=similarity, temperature=0.5, exclude=exclude, impl="reference"
    )
    assert_same(index.search(queries, 5, exclude=exclude), want)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("kind", ["normal", "all equal", "90% copies"])
def test_lists_that_overflow(kind, similarity, wide, device, monkeypatch):
    """All rows of a group are searched: those that its span gives it, and no others."""
    from r2ec_kernels.topk.impl.triton import candidates

    monkeypatch.setattr(candidates, "capacity_of", lambda *sizes: 36)
    problem = make(kind, 3, 420, 20, 5)
    queries, items = problem.queries.to(device), problem.items.to(device)
    want = item_topk(queries, items, 3, similarity=similarity, impl="reference")
    assert_same(item_topk(queries, items, 3, similarity=similarity, impl="triton"), want)


def test_rows_that_no_bound_holds_for(wide, device):
    """Zero, tiny, huge and infinite rows and queries, and scores of -0."""
    generator = torch.Generator().manual_seed(2)
    items = torch.randn(141, 8, generator=generator)
    items[::7] = 0.0
    items[3], items[5], items[9, 0] = 1e-30, 1e30, float("inf")
    queries = torch.randn(4, 8, generator=generator)
    queries[1], queries[2], queries[3] = 0.0, 1e-42, -0.0
    queries, items = queries.to(device), items.to(device)
    for similarity in SIMILARITIES:
        for rows in (items, items[12:]):
            want = item_topk(queries, rows, 2, similarity=similarity, impl="reference")
            assert_same(item_topk(queries, rows, 2, similarity=similarity, impl="triton"), want)


def test_a_place_survives_in_scores_of_zero(wide, device):
    """The place alone is a subnormal number: the one row that is not excluded is found."""
    items = torch.zeros(640, 16, device=device)
    queries = torch.ones(2, 16, device=device)
    kept = torch.tensor([77, 606], device=device)
    every = torch.arange(640, device=device).expand(2, -1)
    exclude = torch.where(every == kept[:, None], -1, every)
    found = item_topk(queries, items, 2, exclude=exclude, impl="triton")
    assert found.indices.tolist() == [[77, -1], [606, -1]]


def test_rows_apart(wide, device, dtype):
    """Rows that the TMA cannot load: strides and beginnings that are not 16-byte aligned."""
    problem = make("normal", BATCH, 900, 51, 5, dtype)
    queries, items = problem.queries.to(device), problem.items.to(device)
    apart = torch.zeros(900, 55, dtype=dtype, device=device)
    apart[:, 2:53] = items
    want = item_topk(queries, items, 9, impl="reference")
    assert_same(item_topk(queries, apart[:, 2:53], 9, impl="triton"), want)
    padded = torch.zeros(900, 64, dtype=dtype, device=device)
    padded[:, :51] = items
    assert_same(item_topk(queries, padded[:, :51], 9, impl="triton"), want)


@pytest.mark.interpreter
def test_which_rows_the_tma_loads(device):
    from r2ec_kernels.topk.impl.triton.wide import _takes_tma

    rows = torch.zeros(9, 64)
    assert _takes_tma(rows) and _takes_tma(rows[:, :51]) and _takes_tma(rows[:, 4:])
    assert not _takes_tma(rows[:, 1:]) and not _takes_tma(torch.zeros(9, 51))
    assert not _takes_tma(torch.zeros(9, 60, dtype=torch.float16))


def test_parts_of_the_buffer(device, monkeypatch):
    """The product of a table that the buffer does not hold at once."""
    from r2ec_kernels.topk.impl.triton import launch, product

    if device == "cpu":
        monkeypatch.setenv("R2EC_IMPL", "triton")
    monkeypatch.setenv("R2EC_SEARCH_WIDE", "cublas")
    table = launch.candidates
    monkeypatch.setattr(launch, "candidates", lambda batch, *args: table(1024, *args))
    monkeypatch.setattr(product, "_BUFFER", 4 * BATCH * 128 * 2)
    problem = make("normal", BATCH, 700, 24, 3, torch.float16)
    queries, items = problem.queries.to(device), problem.items.to(device)
    exclude = make_exclude(BATCH, 700, 30, 3).to(device)
    want = item_topk(queries, items, 4, exclude=exclude, impl="reference")
    assert_same(item_topk(queries, items, 4, exclude=exclude, impl="triton"), want)


def test_many_queries_take_it_by_themselves(device):
    """More than 64, in more than one tile of queries, with lists of excluded items."""
    problem = make("normal", 70, 600, 24, 3)
    queries, items = problem.queries.to(device), problem.items.to(device)
    exclude = make_exclude(70, 600, 4, 3).to(device)
    want = item_topk(queries, items, 3, exclude=exclude, impl="reference")
    assert_same(item_topk(queries, items, 3, exclude=exclude, impl="triton"), want)


def test_the_table_of_launches(monkeypatch):
    from r2ec_kernels.topk.impl.triton.launch import candidates

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("R2EC_SEARCH_WIDE", raising=False)
    for size in (1, 2, 4):
        for batch, taken in ((1, False), (64, True)):
            assert all(c.kind == "tiles" for c in candidates(batch, size, "cuda", taken))
        assert candidates(65, size, "cuda")[0].kind == "fused"
        assert candidates(257, size, "cuda", True)[0].kind == "fused"
    assert candidates(256, 2, "cuda", True)[0].kind == "tiles"
    monkeypatch.setenv("R2EC_SEARCH_WIDE", "cublas")
    assert [c.kind for c in candidates(1024, 2, "cuda")] == ["cublas"]
    # float32 products of the library have no bound of ours
    assert [c.kind for c in candidates(1024, 4, "cuda")] == ["fused"]
    assert candidates(16, 2, "cuda")[0].kind == "tiles"
    monkeypatch.setenv("R2EC_SEARCH_WIDE", "cutlass")
    with pytest.raises(ValueError, match="R2EC_SEARCH_WIDE=cutlass: expected one of tiles, fused"):
        candidates(1024, 2, "cuda")


def test_the_measured_launch_is_remembered(monkeypatch, tmp_path):
    from r2ec_kernels.topk.impl.triton import launch

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("R2EC_AUTOTUNE", "1")
    monkeypatch.setenv("R2EC_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    measured = []

    def time(config) -> float:
        measured.append(config.kind)
        return 1.0 if config.kind == "cublas" else 2.0

    device = torch.device("cpu")
    for batch, d in ((300, 1000), (512, 1024)):
        assert launch.choose(batch, 2, d, device, time).kind == "cublas"
    assert measured == ["fused", "cublas"]
    assert launch.choose(300, 2, 128, device, time).kind == "cublas" and len(measured) == 4
    assert len(json.loads((tmp_path / "launch.json").read_text())) == 2


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_rows_that_are_switched_off(similarity, share, wide, device):
    """No such row is kept of a group, so that a group of one allowed row lists this row alone."""
    from r2ec_kernels._exact.table import Table
    from r2ec_kernels._scan.triton_queries import prepare_on_device
    from r2ec_kernels.topk.impl.triton import search
    from r2ec_kernels.topk.impl.triton.groups import scan_rows

    problem = make("normal", BATCH, 700, 24, 11)
    queries, items = problem.queries.to(device), problem.items.to(device)
    allowed = torch.rand(700, generator=torch.Generator().manual_seed(5)) < share
    exclude = make_exclude(BATCH, 700, 9, 2)
    want = item_topk(
        problem.queries, problem.items, 6, similarity=similarity, include=allowed, exclude=exclude,
        impl="reference",
    )  # fmt: skip
    mask = allowed.to(device)
    given = {"similarity": similarity, "include": mask, "exclude": exclude.to(device)}
    assert_same([x.cpu() for x in item_topk(queries, items, 6, **given)], want)
    if share < 0.1:
        query = prepare_on_device(queries, similarity, 1.0, items.dtype)
        table = Table(items, allowed=mask)
        *_, stats = search(scan_rows(items, similarity), query, table, 6, None, "rows")
        few = int(allowed.sum())
        assert stats().dense_rows == 0 and stats().candidates_per_k <= few / 6

"""The compiled passes, as every kind of CPU that this one can be, and torch give one result."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from _support.processes import environment
from _support.search_cases import KINDS, SIMILARITIES, assert_same, canonical, make, sorted_topk

from r2ec_kernels import ItemIndex, item_topk, target_stats
from r2ec_kernels._cpu import extension
from r2ec_kernels._exact.bounds import prepare_queries
from r2ec_kernels._exact.scores import canonical_scores, pair_scores

CPUS = ("portable", "avx2", "avx512", "amx")
INFINITY = float("inf")
NO_PAIRS = torch.empty(0, dtype=torch.int64)


def run_as(cpu):
    if cpu not in extension.cpu_kinds():
        pytest.skip(f"this CPU is not of the kind {cpu}")
    return extension.use_cpu(cpu)


@pytest.fixture(params=CPUS)
def passes(request):
    """The compiled passes as each kind of CPU."""
    with run_as(request.param):
        yield


@pytest.fixture(params=["none", *CPUS])
def kind(request):
    """These, and torch without them."""
    with run_as(request.param):
        yield


def test_the_environment_chooses_the_kind():
    code = """
import importlib, os
from r2ec_kernels._cpu import extension
print(extension.cpu_kind())
os.environ["R2EC_CPU"] = extension.cpu_kinds()[0]
print(importlib.reload(extension).cpu_kind() == extension.cpu_kinds()[0])
os.environ["R2EC_CPU"] = "vax"
importlib.reload(extension)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(R2EC_CPU="none"),
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["None", "True"]
    assert done.returncode and "R2EC_CPU: expected one of" in done.stderr
    with pytest.raises(ValueError, match="kind: expected one of .*none, got 'vax'"):
        extension.use_cpu("vax").__enter__()


@pytest.mark.parametrize("problem_kind", KINDS)
def test_every_kind_of_cpu_finds_the_same(kind, problem_kind):
    for similarity in SIMILARITIES:
        for number, (batch, count, dim) in enumerate([(1, 700, 64), (3, 333, 33), (19, 500, 70)]):
            problem = make(problem_kind, batch, count, dim, 40 + number, torch.float32)
            scores = canonical(problem.queries, problem.items, similarity, 0.02)
            want = sorted_topk(scores, 7)
            how = {"similarity": similarity, "temperature": 0.02}
            assert_same(item_topk(problem.queries, problem.items, 7, **how), want)
            for scan in ("none", "bf16", "int8"):
                index = ItemIndex(problem.items, scan=scan, **how)
                assert_same(index.search(problem.queries, 7), want)


def test_seen_items_are_left_out(kind):
    problem = make("normal", 20, 3000, 64, 3, torch.float32)
    best = item_topk(problem.queries, problem.items, 30).indices
    hidden = torch.cat([best[:, ::2], torch.full((20, 3), -1)], 1)
    want = sorted_topk(
        canonical(problem.queries, problem.items, "dot", 1.0), 10, [set(r.tolist()) for r in hidden]
    )
    assert_same(item_topk(problem.queries, problem.items, 10, exclude=hidden), want)
    assert_same(
        ItemIndex(problem.items, scan="int8").search(problem.queries, 10, exclude=hidden), want
    )


def test_rows_too_alike_for_their_codes_are_scanned_themselves(kind):
    generator = torch.Generator().manual_seed(5)
    items = torch.randn(3000, 64, generator=generator) + 20 * torch.randn(64, generator=generator)
    queries = items[:6] + 0.1 * torch.randn(6, 64, generator=generator)
    want = item_topk(queries, items, 5, similarity="cosine", impl="reference")
    index = ItemIndex(items, similarity="cosine", scan="int8")
    assert_same(index.search(queries, 5), want)
    assert index.last_search.scanned_again == 6 and index.last_search.dense_rows == 0
    chosen = ItemIndex(items, similarity="cosine")
    for _ in range(4):  # learns which products do not serve these rows
        assert_same(chosen.search(queries, 5), want)
    assert chosen.last_search.scanned_again == 0


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("batch", [1, 4, 7, 40])
def test_ranks_and_log_probabilities(kind, similarity, batch):
    generator = torch.Generator().manual_seed(batch)
    items = torch.randn(5003, 61, generator=generator)
    items[100:200] = items[:100]  # ties
    queries = torch.randn(batch, 61, generator=generator)
    targets = torch.randint(0, 200, (batch,), generator=generator)
    exclude = torch.randint(-1, 5003, (batch, 40), generator=generator)
    scores = canonical_scores(queries, items, similarity, 0.5)
    own = scores.gather(1, targets[:, None])
    alive = torch.ones_like(scores, dtype=torch.bool)
    for row, left_out, target in zip(alive, exclude, targets, strict=True):
        row[left_out[(left_out >= 0) & (left_out != target)]] = False
    first = torch.arange(5003) < targets[:, None]
    ahead = (scores > own) | ((scores == own) & first)
    want = (scores.double().masked_fill(~alive, -INFINITY)).log_softmax(1)
    how = {"similarity": similarity, "temperature": 0.5, "exclude": exclude}
    found = target_stats(queries, items, targets, **how)
    assert torch.equal(found.rank, 1 + (ahead & alive).sum(1))
    torch.testing.assert_close(
        found.log_prob.double(), want.gather(1, targets[:, None])[:, 0], rtol=3e-6, atol=1e-5
    )
    how.pop("exclude")
    index = ItemIndex(items, **how)
    scanned = index.target_stats(queries, targets, exclude=exclude)
    assert torch.equal(scanned.rank, found.rank)
    torch.testing.assert_close(scanned.log_prob, found.log_prob, rtol=0, atol=1e-3)


def stable_ranks(queries, items, targets, similarity, alive=None):
    scores = canonical_scores(queries, items, similarity, 0.02)
    own = scores.gather(1, targets[:, None])
    ahead = (scores > own) | ((scores == own) & (torch.arange(len(items)) < targets[:, None]))
    return 1 + (ahead if alive is None else ahead & alive).sum(1)


@pytest.fixture
def fine(passes, monkeypatch):
    """Codes of two numbers, whatever the CPU."""
    monkeypatch.setattr(extension, "has_amx", lambda: True)
    used = []
    one_pass = extension.code_stats
    monkeypatch.setattr(
        extension, "code_stats", lambda *given: used.append(one_pass(*given)) or used[-1]
    )
    return used


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("problem_kind", KINDS)
def test_fine_codes_rank_exactly(fine, similarity, problem_kind):
    for number, (batch, count, dim) in enumerate([(1, 700, 64), (5, 333, 33), (19, 1003, 70)]):
        problem = make(problem_kind, batch, count, dim, 60 + number, torch.float32)
        targets = torch.arange(batch) * 17 % count
        index = ItemIndex(problem.items, similarity=similarity, temperature=0.02)
        found = index.target_stats(problem.queries, targets)
        want = stable_ranks(problem.queries, problem.items, targets, similarity)
        assert torch.equal(found.rank, want)
        scores = canonical_scores(problem.queries, problem.items, similarity, 0.02).double()
        want = scores.log_softmax(1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found.log_prob.double(), want, rtol=1e-5, atol=1e-3)


def test_fine_codes_follow_every_change(fine):
    generator = torch.Generator().manual_seed(2)
    items = torch.randn(500, 48, generator=generator) + 3 * torch.randn(48, generator=generator)
    queries = torch.randn(9, 48, generator=generator)
    index = ItemIndex(items[:400], similarity="cosine", temperature=0.5)
    index.target_stats(queries, torch.arange(9))  # from here on they are kept
    index.append(items[400:])
    items[20:60] = items[100:140]  # ties
    index.write(torch.arange(20, 60), items[20:60])
    index.remove(torch.arange(200, 300))
    alive = torch.ones(9, 500, dtype=torch.bool)
    alive[:, 200:300] = False
    alive[torch.arange(9), torch.arange(400, 409)] = False
    targets = torch.tensor([0, 20, 100, 139, 399, 400, 499, 59, 3])
    found = index.target_stats(queries, targets, exclude=torch.arange(400, 409)[:, None])
    alive[torch.arange(9), targets] = True
    assert torch.equal(found.rank, stable_ranks(queries, items, targets, "cosine", alive))
    scores = canonical_scores(queries, items, "cosine", 0.5).double()
    want = scores.masked_fill(~alive, -INFINITY).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.log_prob.double(), want, rtol=0, atol=1e-5)
    assert len(fine) == 2 and all(stats.complete for stats in fine)


def test_fine_codes_leave_few_pairs_open(fine):
    generator = torch.Generator().manual_seed(3)
    items = torch.randn(6000, 64, generator=generator)
    queries = items[:16] + 3 * torch.randn(16, 64, generator=generator)
    index = ItemIndex(items, similarity="cosine", temperature=0.02)
    index.target_stats(queries, torch.arange(16))
    assert fine[0].complete and fine[0].near_ties.numel() < 16  # of 96,000


def test_rows_that_codes_cannot_hold_are_ranked_by_themselves(fine):
    items = torch.randn(300, 32)
    items[7] = 1e30
    queries, targets = torch.randn(4, 32), torch.tensor([7, 8, 9, 10])
    index = ItemIndex(items)
    scores = canonical_scores(queries, items, "dot", 1.0)
    own = scores.gather(1, targets[:, None])
    ahead = (scores > own) | ((scores == own) & (torch.arange(300) < targets[:, None]))
    assert torch.equal(index.target_stats(queries, targets).rank, 1 + ahead.sum(1))
    assert len(fine) == 1 and not fine[0].complete


def stats_of(queries, items, targets, most_near=1 << 20):
    query = prepare_queries(queries, "dot", 1.0)
    raw = (queries.double() * query.scale[:, None] * items[targets].double()).sum(1)
    logit = (1 / query.scale).float() * 1.442695
    own = targets * len(queries) + torch.arange(len(queries))
    one = torch.ones(len(queries), dtype=torch.float64)
    compared = extension.RankTargets(raw, raw.float(), logit, one, own)
    return extension.stats(items, query, compared, most_near)


@pytest.mark.parametrize("batch", [2, 33])
def test_sums_do_not_depend_on_threads(passes, batch):
    items, queries = torch.randn(9001, 40), torch.randn(batch, 40)
    targets = torch.arange(batch) * 7
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(stats_of(queries, items, targets))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.l, found[0].l) and torch.equal(other.m, found[0].m)
        assert torch.equal(other.ahead, found[0].ahead)
        assert torch.equal(other.near_ties, found[0].near_ties)


def test_too_many_ties_stop_the_pass_and_are_settled_elsewhere(passes):
    items = torch.ones(6400, 8)
    queries = torch.ones(6, 8)
    found = stats_of(queries, items, torch.arange(6), most_near=50)
    assert not found.complete and found.near_ties.numel() < 6399 * 6
    assert stats_of(queries, items, torch.arange(6), most_near=64 * 1000).complete
    rank = target_stats(queries, items, torch.arange(6)).rank
    assert torch.equal(rank, torch.arange(1, 7))


def test_rows_out_of_range_are_reported(passes):
    items = torch.randn(500, 16)
    items[7], items[300] = 1e30, float("nan")
    query = prepare_queries(torch.randn(3, 16), "dot", 1.0)
    collector = extension.Collector(3, 4, 600, NO_PAIRS)
    assert collector.add_rows(items, query).sort().values.tolist() == [7, 300]
    rows, failed, _ = collector.finish()
    assert not failed.any() and not ({7, 300} & set(rows.flatten().tolist()))
    assert not stats_of(torch.randn(2, 16), items, torch.tensor([0, 1])).complete


def test_mass_ties_give_a_query_up(passes):
    query = prepare_queries(torch.ones(2, 16), "dot", 1.0)
    collector = extension.Collector(2, 4, 100, NO_PAIRS)
    collector.add_rows(torch.ones(5000, 16), query)
    rows, failed, offered = collector.finish()
    assert failed.all() and (rows == -1).all() and offered < 5000


@pytest.mark.parametrize(
    "dtype, columns", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_products_of_a_library_are_filtered(passes, dtype, columns):
    products = torch.randn(2000, 37).to(dtype)
    scale, half = torch.rand(2000) + 0.5, torch.rand(2000)
    scores = products.float() * scale[:, None] - half[:, None]
    stored = products.T.contiguous().T if columns else products
    collector = extension.Collector(37, 5, 552, NO_PAIRS)
    error = torch.full((37,), 1e-3)
    for start in (1024, 0):
        part = slice(start, start + 1024)
        size = len(scale[part])
        collector.add_products(stored[part], start, size, scale[part], half[part], error, 2.0**-9)
    rows, failed, _ = collector.finish()
    slack = 1e-3 + 2.0**-9 * (scores + half[:, None]).abs()
    least = (scores - slack).topk(5, dim=0).values[-1]
    for query in range(37):
        want = ((scores + slack)[:, query] >= least[query]).nonzero()[:, 0].tolist()
        assert sorted(row for row in rows[query].tolist() if row >= 0) == want
    assert not failed.any()


def test_codes_are_multiplied_exactly(passes):
    generator = np.random.default_rng(0)
    for batch, count, columns in ((1, 33, 64), (5, 100, 128), (6, 31, 64), (40, 77, 192)):
        codes = generator.integers(-127, 128, (count, columns)).astype(np.int8)
        queries = generator.integers(-9000, 9001, (batch, columns)).astype(np.int16)
        out = torch.empty(batch, count)
        step = torch.rand(batch)
        extension.multiply_codes(torch.from_numpy(codes), torch.from_numpy(queries), step, out)
        want = torch.from_numpy(queries.astype(np.int64) @ codes.astype(np.int64).T)
        assert torch.equal(out, want.float() * step[:, None])


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_scores_of_pairs_are_canonical(similarity):
    for problem_kind in KINDS:
        problem = make(problem_kind, 5, 90, 37, 8, torch.float32)
        of, at = torch.randint(0, 5, (400,)), torch.randint(0, 90, (400,))
        inputs = problem.queries, problem.items, of, at, similarity, 0.3
        found = extension.pair_scores(*inputs)
        assert torch.equal(found.view(torch.int32), pair_scores(*inputs).view(torch.int32))
        want = canonical_scores(problem.queries, problem.items, similarity, 0.3)[of, at]
        assert torch.equal(found.view(torch.int32), want.view(torch.int32))


def test_bad_arrays_are_refused():
    collector = extension.Collector(2, 3, 500, NO_PAIRS)
    codes, error = torch.zeros(40, 64, dtype=torch.int8), torch.zeros(2)
    queries = torch.zeros(2, 64, dtype=torch.int16)

    def sized(codes, num_rows=40):
        return extension.Codes(codes, num_rows, None, None, None, queries, error, error)

    with pytest.raises(ValueError, match="codes: expected"):
        collector.add_codes(sized(codes, 41))
    with pytest.raises(ValueError, match="multiple of 64"):
        collector.add_codes(sized(codes[:, :60].clone()))
    with pytest.raises(ValueError, match="queries: expected"):
        collector.add_codes(sized(codes)._replace(queries=queries[:, :32].clone()))
    with pytest.raises(ValueError, match="step, error: expected"):
        collector.add_codes(sized(codes)._replace(queries=queries[:1]))
    with pytest.raises(ValueError, match="scale: too short"):
        collector.add_codes(sized(codes)._replace(scale=torch.ones(39)))
    with pytest.raises(ValueError, match="products: expected"):
        collector.add_products(torch.zeros(5, 3), 0, 5, None, None, error, 0.0)
    with pytest.raises(ValueError, match="out of range"):
        extension.pair_scores(
            torch.ones(1, 4), torch.ones(2, 4), torch.tensor([0]), torch.tensor([2]), "dot", 1.0
        )

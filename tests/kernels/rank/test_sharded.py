"""sharded_target_stats: each part against the definition, the merge, and gloo processes."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from _support import non_finite_cases
from _support.processes import assert_dead_rank_named, run_ranks
from _support.rank_parts import part_stats
from _support.search_cases import KINDS, SIMILARITIES, make, make_exclude, make_include

from r2ec_kernels import sharded_target_stats, target_stats
from r2ec_kernels._cpu import extension
from r2ec_kernels._exact.bounds import prepare_queries
from r2ec_kernels._exact.excluded import ExcludedPairs
from r2ec_kernels._exact.table import Table
from r2ec_kernels._scan import float32
from r2ec_kernels.rank.impl import common
from r2ec_kernels.rank.impl import torch as torch_impl
from r2ec_kernels.rank.sharded import merged_log_prob

CHECK = Path(__file__).parent / "sharded_check.py"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
WAYS = [*extension.cpu_kinds(), "dense", "reference"]


@pytest.fixture(params=WAYS)
def impl(request, monkeypatch):
    """Every way to the statistics of a part, in small blocks; the name of the implementation."""
    for name in ("_BLOCK", "_PIECE"):
        monkeypatch.setattr(float32, name, 1)
    monkeypatch.setattr(common, "MIN_BLOCK", 64)
    monkeypatch.setattr(common, "BLOCK_ELEMENTS", 1)
    if request.param == "dense":
        monkeypatch.setattr(torch_impl, "_scanned_stats", lambda *arguments: None)
    kind = request.param if request.param in extension.cpu_kinds() else "none"
    with extension.use_cpu(kind):
        yield "reference" if request.param == "reference" else "torch"


def test_by_hand(impl):
    items = torch.tensor([[5.0], [1.0], [4.0], [4.0], [9.0], [2.0]]).log()
    targets = torch.tensor([2, 3])
    # {5, 1, 4} and {4, 9, 2}: a target beside the other part comes before it, or behind
    arguments = torch.ones(2, 1), items, targets, (0, 3, 6), impl, "dot", 1.0
    ranks, log_probs, whole = part_stats(*arguments, None, None)
    assert ranks.tolist() == [[2, 3], [2, 2]]
    want = torch.tensor([[4 / 10, 4 / 14], [4 / 19, 4 / 15]])
    torch.testing.assert_close(log_probs.exp(), want)
    assert whole[0].tolist() == [3, 4]
    torch.testing.assert_close(whole[1].exp(), torch.tensor([4 / 25, 4 / 25]))
    # without 9, and for the second without 5; only {5, 4, 9} compete
    exclude, include = torch.tensor([[4, 2], [0, 4]]), torch.tensor([0, 3, 4])
    ranks, log_probs, whole = part_stats(*arguments, exclude, include)
    assert ranks.tolist() == [[2, 1], [1, 1]]
    torch.testing.assert_close(log_probs.exp(), torch.tensor([[4 / 9, 1.0], [4 / 8, 1.0]]))
    assert whole[0].tolist() == [2, 1]
    torch.testing.assert_close(whole[1].exp(), torch.tensor([4 / 13, 1.0]))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_parts_make_the_whole(similarity, impl):
    for number, kind in enumerate(sorted(KINDS)):
        problem = make(kind, 6, 331, 12, number, DTYPES[number % 3])
        targets = torch.tensor([0, 100, 101, 330, 250, 99])
        exclude = make_exclude(6, 331, 9, number)
        exclude[::2, 0] = targets[::2]
        include = make_include(331, 150, ("mask", "ids")[number % 2], number)[0]
        for lists in ((None, None), (exclude, None), (None, include), (exclude, include)):
            given = problem.queries, problem.items, targets
            scoring = similarity, 0.3
            names = ("similarity", "temperature", "exclude", "include")
            how = dict(zip(names, (*scoring, *lists), strict=True))
            want = target_stats(*given, impl="reference", **how)
            _, _, got = part_stats(*given, (0, 100, 101, 331), impl, *scoring, *lists)
            assert torch.equal(got[0], want.rank), (kind, got[0], want.rank)
            torch.testing.assert_close(got[1], want.log_prob, rtol=3e-6, atol=3e-5)


@pytest.mark.parametrize("where", non_finite_cases.WHERE)
def test_parts_of_what_is_not_finite(where, impl):
    exclude = torch.tensor([[0, 7, 11]] * 7)
    include = torch.arange(300) % 3 > 0
    for similarity, dtype in itertools.product(SIMILARITIES, DTYPES):
        queries, items = non_finite_cases.make(where, dtype, batch=7)
        given = queries, items, torch.tensor([7, 0, 40, 11, 200, 1, 41])
        for lists in ((None, None), (exclude, None), (exclude, include)):
            scoring = similarity, 0.5
            hidden = lists[0]
            if lists[1] is not None:  # the same as exclusions
                hidden = torch.cat([exclude, (~include).nonzero().T.expand(7, -1)], dim=1)
            want = non_finite_cases.stats_by_definition(*given, *scoring, hidden)
            *_, got = part_stats(*given, (0, 8, 150, 300), impl, *scoring, *lists)
            assert torch.equal(got[0], want[0]), (similarity, dtype, got[0], want[0])
            torch.testing.assert_close(got[1], want[1], rtol=3e-6, atol=3e-5)


def test_infinite_scores_share_the_mass_across_parts(impl):
    items = torch.tensor([[INF], [1.0], [INF], [-INF], [NAN], [2.0], [INF]])
    queries = torch.tensor([[1.0], [-1.0]]).repeat_interleave(7, 0)
    targets = torch.arange(7).repeat(2)
    *_, (rank, log_prob) = part_stats(
        queries, items, targets, (0, 1, 4, 7), impl, "dot", 1.0, None, None
    )
    assert rank.tolist() == [1, 5, 2, 6, 7, 4, 3] + [4, 2, 5, 1, 7, 3, 6]
    third = -math.log(3)
    want = [third, -INF, third, -INF, -INF, -INF, third, *[-INF] * 3, 0.0, *[-INF] * 3]
    torch.testing.assert_close(log_prob, torch.tensor(want))
    lost = torch.full((5, 1), -INF)  # all of them share
    arguments = torch.ones(5, 1), lost, torch.arange(5), (0, 2, 5), impl, "dot", 1.0
    *_, (rank, log_prob) = part_stats(*arguments, None, None)
    assert rank.tolist() == [1, 2, 3, 4, 5]
    torch.testing.assert_close(log_prob, torch.full((5,), -math.log(5)))


def test_a_foreign_row_beyond_float32(impl):
    """Of a target in another part no scan sees the norm; its score is finite."""
    items = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    items[150] = torch.tensor([3e38, 3e38, 3e38, -1e38])
    items[3] = items[150] / 2
    queries, targets = torch.ones(4, 4), torch.tensor([150, 3, 0, 199])
    for similarity, temperature in itertools.product(SIMILARITIES, (1e10, 1e37)):
        given, scoring = (queries, items, targets), (similarity, temperature)
        want = target_stats(*given, similarity=similarity, temperature=temperature, impl="torch")
        *_, got = part_stats(*given, (0, 100, 120, 200), impl, *scoring, None, None)
        assert torch.equal(got[0], want.rank)
        torch.testing.assert_close(got[1], want.log_prob, rtol=3e-6, atol=3e-5)


def test_only_rows_of_the_table_are_excluded():
    at, rows = torch.tensor([-1, 2, 3]), torch.ones(3, 1)
    table, query = Table(torch.ones(3, 1)), prepare_queries(torch.ones(3, 1), "dot", 1.0)
    given = ExcludedPairs(torch.tensor([2, 0]), torch.tensor([0, 1]), 3)
    pairs = common.Targets.of(table, query, at, rows).added_to(given)
    assert list(zip(pairs.of.tolist(), pairs.rows.tolist(), strict=True)) == [
        (2, 0),
        (0, 1),
        (1, 2),
    ]


def test_merged_log_probabilities():
    """Of weights that float64 cannot hold, of none, and of one part."""
    parts = torch.tensor(
        [
            [-2000.0, -2000.0, 0.0, -1e-30, -INF, 1e-9, -1e-9],
            [-3000.0, -2000.0, 0.0, -1e-30, -1.0, 0.0, -3.0],
        ],
        dtype=torch.float64,
    )
    third = -math.log(math.exp(3) + 1e-9)
    want = [-3000.0, -2000 - math.log(2), 0.0, -2e-30, -INF, 0.0, third]
    got = merged_log_prob(parts)
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-7, atol=0.0)
    assert not got[2].signbit()
    alone = torch.tensor([[-0.25, -INF, 0.0, -88.0]], dtype=torch.float64)
    assert torch.equal(merged_log_prob(alone), alone[0].float())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equal_to_one_process(ranks, tmp_path):
    for output, code in run_ranks(CHECK, ranks, tmp_path / "store", -1):
        assert code == 0, output


def test_a_dead_rank_is_named_by_the_others(tmp_path):
    assert_dead_rank_named(run_ranks(CHECK, 3, tmp_path / "store", 1), dead=1)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"first_id": -1}, ValueError, "first_id: expected at least 0, got -1"),
        ({"first_id": 2**32}, ValueError, "first_id: expected 0..4294967290, got 4294967296"),
        ({"targets": [0, -1]}, ValueError, "targets: expected values in 0..4294967294, got -1"),
        ({"targets": [0]}, ValueError, r"targets: expected shape \[2\], got \[1\]"),
        ({"local_items": torch.ones(5, 3)}, ValueError, r"local_items: expected shape \[rows, 4\]"),
        ({"similarity": "angle"}, ValueError, "similarity: expected one of"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number"),
        ({"exclude": torch.ones(3, 1).long()}, ValueError, r"exclude: expected shape \[2, L\]"),
        ({"include": torch.ones(4) > 0}, ValueError, "include: expected a mask of at least 5"),
        ({"target_rows": torch.ones(1, 4)}, ValueError, r"target_rows: expected shape \[2, 4\]"),
        ({"target_rows": torch.ones(2, 4).half()}, TypeError, "target_rows: expected torch.float3"),
        ({}, RuntimeError, "sharded_target_stats: torch.distributed is not initialised"),
    ],
)
def test_bad_arguments_are_named(changes, error, words):
    arguments = {
        "queries": torch.ones(2, 4),
        "local_items": torch.ones(5, 4),
        "targets": [0, 1],
        "first_id": 0,
    } | changes
    positional = [arguments.pop(name) for name in ("queries", "local_items", "targets")]
    with pytest.raises(error, match=f"^{words}"):
        sharded_target_stats(*positional, **arguments)

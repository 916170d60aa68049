"""NaN and infinities in searches: every path agrees with one definition, written here once more.

A canonical score that is NaN means "cannot be compared": the item is never returned. +inf and -inf
are scores like any other, ties by the lower id.
"""

import itertools

import pytest
import torch
from _support.non_finite_cases import DTYPES, INF, NAN, WHERE, make, topk_by_definition
from _support.search_cases import SIMILARITIES

from r2ec_kernels import ItemIndex, item_topk
from r2ec_kernels._cpu import extension
from r2ec_kernels._exact.scores import PADDING_KEY, from_order_keys, order_keys
from r2ec_kernels._scan import row_search
from r2ec_kernels.topk.impl import common


def assert_equal(got, want, what):
    assert torch.equal(got[1], want[1]), what
    assert torch.equal(got[0], want[0]), what


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_never_returned_and_everything_else_in_order(where, similarity):
    for dtype, excluding, k in itertools.product(DTYPES, (False, True), (1, 7, 299, 310)):
        queries, items = make(where, dtype)
        exclude = torch.tensor([[0, 7, 11], [11, -1, -1], [3, 4, 5], [-1] * 3, [20, 21, 20]])
        how = {"similarity": similarity, "temperature": 0.5}
        how["exclude"] = exclude if excluding else None
        want = topk_by_definition(queries, items, k, **how)
        for impl in ("reference", "torch"):
            got = item_topk(queries, items, k, impl=impl, **how)
            assert_equal(got, want, (impl, dtype, excluding, k))
            assert not got.scores.isnan().any()
        with extension.use_cpu("none"):
            got = item_topk(queries, items, k, impl="torch", **how)
            assert_equal(got, want, ("torch alone", dtype, excluding, k))


@pytest.mark.parametrize("where", ["queries", "rows", "overflow"])
@pytest.mark.parametrize("cpu", ["portable", "avx2", "avx512", "amx"])
def test_every_kind_of_cpu(where, cpu):
    if cpu not in extension.cpu_kinds():
        pytest.skip(f"this CPU is not of the kind {cpu}")
    with extension.use_cpu(cpu):
        for similarity in SIMILARITIES:
            queries, items = make(where, torch.float32, count=1000)
            how = {"similarity": similarity, "temperature": 0.02}
            want = topk_by_definition(queries, items, 9, exclude=None, **how)
            assert_equal(item_topk(queries, items, 9, **how), want, similarity)


@pytest.mark.parametrize("scan", ["none", "fp16", "bf16", "int8", "auto"])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_an_index_takes_any_query(scan, similarity):
    """Its rows are finite; its queries need not be."""
    for where in ("queries", "overflow"):
        queries, items = make(where, torch.float32, count=400)
        queries[4] = INF
        how = {"similarity": similarity, "temperature": 0.5}
        index = ItemIndex(items, scan=scan, **how)
        for k in (3, 400):
            want = topk_by_definition(queries, items, k, exclude=None, **how)
            assert_equal(index.search(queries, k), want, (where, k))


def test_a_nan_row_does_not_hide_a_small_one():
    """The least norm of a block is NaN then, and a norm that float32 loses went unnoticed."""
    items = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    items[3] = NAN
    items[5] *= 1e-30
    queries = items[5:6] * 1e30
    for scan in (True, False):
        with pytest.MonkeyPatch.context() as without:
            if not scan:
                without.setattr(extension, "_native", None)
            got = item_topk(queries, items, 2, similarity="cosine")
            assert got.indices[0, 0] == 5


def test_a_table_of_nothing_but_nan():
    for items in (torch.full((50, 4), NAN), torch.full((3, 4), NAN)):
        got = item_topk(torch.ones(2, 4), items, 2)
        assert got.indices.tolist() == [[-1, -1]] * 2
        assert got.scores.tolist() == [[-INF, -INF]] * 2


def test_order_keys_of_nan_are_those_of_no_item():
    scores = torch.tensor([NAN, INF, -INF, -NAN, 0.0])
    keys = order_keys(scores, torch.arange(5))
    assert keys[0] == keys[3] == PADDING_KEY and keys.argsort(descending=True)[:3].tolist() == [
        1,
        4,
        2,
    ]
    back, ids = from_order_keys(keys)
    assert back.tolist() == [-INF, INF, -INF, -INF, 0.0] and ids.tolist() == [-1, 1, 2, -1, 4]


def test_merged_keys_of_shards_leave_nan_out(monkeypatch):
    """What ``sharded_topk`` merges: the keys of two halves of a table, NaN in both."""
    from r2ec_kernels import _collective, sharded_topk

    queries, items = make("rows", torch.float32)
    halves = []

    def keep(op, keys, group):
        halves.append(keys)
        return halves

    monkeypatch.setattr(_collective, "all_gather", keep)
    sharded_topk(queries, items[:150], 299, first_id=0)
    got = sharded_topk(queries, items[150:], 299, first_id=150)
    assert_equal(got, item_topk(queries, items, 299, impl="reference"), "merged")


def test_the_dense_path_alone(monkeypatch):
    for module in (common, row_search):  # neither search may answer
        monkeypatch.setattr(module, "DENSE_SHARE", 10**9)
    queries, items = make("both", torch.float32)
    want = topk_by_definition(queries, items, 12, "dot", 1.0, None)
    assert_equal(item_topk(queries, items, 12, impl="torch"), want, "dense")

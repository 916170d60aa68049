"""sharded_topk over gloo processes."""

from pathlib import Path

import pytest
import torch
from _support.processes import assert_dead_rank_named, run_ranks

from r2ec_kernels import TopK, item_topk, merge_topk, sharded_topk

CHECK = Path(__file__).parent / "sharded_check.py"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equal_to_one_process_bit_for_bit(ranks, tmp_path):
    for output, code in run_ranks(CHECK, ranks, tmp_path / "store", -1):
        assert code == 0, output


def test_a_dead_rank_is_named_by_the_others(tmp_path):
    assert_dead_rank_named(run_ranks(CHECK, 3, tmp_path / "store", 1), dead=1)


def test_arguments():
    queries, items = torch.ones(1, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="first_id"):
        sharded_topk(queries, items, 1, first_id=-1)
    for include, words in (
        ([-1], "in 0.."),
        (torch.ones(4) > 0, "mask of at least 5 items, got 4"),
    ):
        with pytest.raises(ValueError, match=f"include: expected .*{words}"):
            sharded_topk(queries, items, 1, first_id=2, include=include)
    with pytest.raises(RuntimeError, match="not initialised"):
        sharded_topk(queries, items, 1, first_id=0)


def test_merged_parts_are_the_whole():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, 6, generator=generator)
    items = torch.randint(-1, 2, (30, 6), generator=generator).float()  # many equal scores
    for k in (1, 4, 40):
        whole = item_topk(queries, items, k)
        parts = []
        for start, stop in ((0, 7), (7, 8), (8, 30)):
            top = item_topk(queries, items[start:stop], min(k, 25))
            parts.append(TopK(top.scores, torch.where(top.indices < 0, -1, top.indices + start)))
        for given in (parts, parts[::-1]):
            merged = merge_topk(given, k)
            assert torch.equal(merged.indices, whole.indices)
            assert torch.equal(merged.scores, whole.scores)


def test_merging_refuses_what_does_not_fit_together():
    scores, ids = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="parts: expected at least one"):
        merge_topk([], 3)
    with pytest.raises(ValueError, match=r"parts\[1\].scores"):
        merge_topk([TopK(scores, ids), TopK(scores[:1], ids[:1])], 3)
    with pytest.raises(ValueError, match=r"parts\[0\].indices"):
        merge_topk([TopK(scores, ids[:, :2])], 3)

"""Run with TRITON_INTERPRET=1: the kernels of search and rank against the definition, for numbers
that are not finite."""

import itertools
import sys

import torch
from _support.non_finite_cases import WHERE, make, stats_by_definition, topk_by_definition
from _support.search_cases import SIMILARITIES

from r2ec_kernels import item_topk, target_stats


def main():
    targets = torch.tensor([7, 0, 40, 11, 99])
    exclude = torch.tensor([[0, 7, 11], [11, -1, -1], [3, 3, 5], [-1] * 3, [20, 21, 20]])
    cases = 0
    for where, similarity, dtype, excluding in itertools.product(
        WHERE, SIMILARITIES, (torch.float32, torch.bfloat16), (False, True)
    ):
        queries, items = make(where, dtype, count=201, d=24)
        how = {"similarity": similarity, "temperature": 0.5}
        how["exclude"] = exclude if excluding else None
        got = item_topk(queries, items, 2, impl="triton", **how)
        want = topk_by_definition(queries, items, 2, **how)
        case = (where, similarity, dtype, excluding)
        assert torch.equal(got.indices, want[1]) and torch.equal(got.scores, want[0]), case
        got = target_stats(queries, items, targets, impl="triton", **how)
        want = stats_by_definition(queries, items, targets, **how)
        assert torch.equal(got.rank, want[0]), (case, got.rank, want[0])
        torch.testing.assert_close(got.log_prob, want[1], rtol=1e-5, atol=1e-4, msg=str(case))
        cases += 2
    sys.stdout.write(f"cases {cases}\n")


if __name__ == "__main__":
    main()

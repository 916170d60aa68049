"""Run by test_triton.py in a process of its own, because Triton's interpreter is chosen when a
kernel is defined. Compares the Triton path with the reference."""

import itertools
import sys

import torch
from _support.search_cases import KINDS, SIMILARITIES, make, make_exclude

from r2ec_kernels import ItemIndex, item_topk

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def main(similarities: list[str]) -> int:
    cases = 0
    kinds = sorted(KINDS)
    for number, (kind, similarity) in enumerate(itertools.product(kinds, similarities)):
        dtype = DTYPES[number % 3]
        problem = make(kind, 5, 700, 40, number, dtype)
        exclude = make_exclude(5, 700, 30, number)
        how = {"similarity": similarity, "temperature": 0.02}
        scan = ("none", "bf16", "int8")[number % 3]
        index = ItemIndex(problem.items, scan=scan, **how)
        for k in (1, 9):
            want = item_topk(
                problem.queries, problem.items, k, exclude=exclude, impl="reference", **how
            )
            found = {
                "item_topk": item_topk(
                    problem.queries, problem.items, k, exclude=exclude, impl="triton", **how
                ),
                scan: index.search(problem.queries, k, exclude=exclude),
            }
            for name, got in found.items():
                cases += 1
                if not (torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])):
                    print("MISMATCH", kind, similarity, dtype, k, name)  # noqa: T201
                    return 1
        stats = index.last_search
        if kind == "normal" and (stats.dense_rows or not stats.scan.startswith("triton")):
            print("DENSE", stats)  # noqa: T201
            return 1
    print("cases", cases)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(SIMILARITIES)))

"""One rank of the sharded search tests: rank, ranks, store file, mode."""

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist
from _support.search_cases import SIMILARITIES, make, make_exclude, make_include

from r2ec_kernels import item_topk, sharded_topk


def main(rank: int, ranks: int, store: str, dying: int) -> int:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    for number, kind in enumerate(("normal", "90% copies", "all equal", "zero rows")):
        problem = make(kind, 5, 1003, 16, number)
        exclude = make_exclude(5, 1003, 9, number)
        forms = (("ids", 60), ("mask", 500), ("list", 1))
        include = make_include(1003, *forms[number - 1][::-1], number)[0] if number else None
        edges = [0, *sorted(torch.randperm(1003)[: ranks - 1].tolist()), 1003]
        dist.broadcast_object_list(edges, src=0)
        first, last = edges[rank], edges[rank + 1]
        if rank == dying:
            os.kill(os.getpid(), 9)
        for similarity in SIMILARITIES:
            for k in (1, 20, 1200):
                how = {"similarity": similarity, "temperature": 0.02, "exclude": exclude}
                how["include"] = include
                want = item_topk(problem.queries, problem.items, k, **how)
                begin = time.monotonic()
                try:
                    got = sharded_topk(
                        problem.queries, problem.items[first:last], k, first_id=first, **how
                    )
                except RuntimeError as error:
                    print(f"{time.monotonic() - begin:.1f} s: {error}")  # noqa: T201
                    return 7
                assert torch.equal(got.indices, want.indices)
                assert torch.equal(got.scores, want.scores)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))

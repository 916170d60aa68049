"""One rank of the tests of ``sharded_target_stats``: rank, ranks, store file, rank that dies."""

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist
from _support import non_finite_cases
from _support.search_cases import SIMILARITIES, make, make_exclude, make_include

from r2ec_kernels import sharded_target_stats, target_stats
from r2ec_kernels.rank.sharded import gather_target_rows

COUNT, BATCH = 403, 6
KINDS = ("normal", "90% copies", "all equal", "zero rows", "near ties", "wild scales")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def edges_of(ranks: int, number: int) -> list[int]:
    """Where the ranks' rows begin and end: uneven, with an empty shard in two cases of three."""
    generator = torch.Generator().manual_seed(number)
    inner = torch.randperm(COUNT, generator=generator)[: ranks - 1].sort().values.tolist()
    if inner and number % 3 == 1:
        inner[0] = 0  # the first rank has nothing
    if inner and number % 3 == 2:
        inner[-1] = COUNT  # the last one
    return [0, *inner, COUNT]


def assert_same_everywhere(got, group=None) -> None:
    """Bit for bit the same on every rank."""
    own = torch.stack([got.rank.double(), got.log_prob.view(torch.int32).double()])
    others = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(others, own, group=group)
    assert all(torch.equal(other, own) for other in others)


def check_finite(rank: int, ranks: int) -> None:
    for number, kind in enumerate(KINDS):
        problem = make(kind, BATCH, COUNT, 16, number, DTYPES[number % 3])
        edges = edges_of(ranks, number)
        first, last = edges[rank], edges[rank + 1]
        generator = torch.Generator().manual_seed(number)
        targets = torch.randint(0, COUNT, (BATCH,), generator=generator)
        targets[:4] = torch.tensor([0, COUNT - 1, edges[1] % COUNT, max(edges[1] - 1, 0)])
        exclude = make_exclude(BATCH, COUNT, 9, number)
        exclude[::2, 0] = targets[::2]
        form, size = (("ids", 60), ("mask", 200), ("list", 1))[number % 3]
        include = make_include(COUNT, size, form, number)[0]
        for similarity in SIMILARITIES:
            for lists in ({}, {"exclude": exclude}, {"exclude": exclude, "include": include}):
                # dot products of up to 10^5 times the temperature's inverse: weights beyond float64
                how = {"similarity": similarity, "temperature": 0.02, **lists}
                want = target_stats(problem.queries, problem.items, targets, **how)
                given = problem.queries, problem.items[first:last], targets
                own = problem.items[targets] if number % 2 else None
                got = sharded_target_stats(*given, first_id=first, target_rows=own, **how)
                assert_same_everywhere(got)
                assert torch.equal(got.rank, want.rank), (kind, similarity, lists)
                torch.testing.assert_close(got.log_prob, want.log_prob, rtol=3e-6, atol=3e-5)


def check_non_finite(rank: int, ranks: int) -> None:
    for number, where in enumerate(non_finite_cases.WHERE):
        queries, items = non_finite_cases.make(where, DTYPES[number % 3], batch=7)
        # rows with NaN and infinity among them
        targets = torch.tensor([7, 0, 40, 11, 200, 1, 41]).roll(number)
        edges = [0, *sorted([8, 150, 250][: ranks - 1]), len(items)]
        first, last = edges[rank], edges[rank + 1]
        for similarity in SIMILARITIES:
            for exclude in (None, torch.tensor([[0, 7, 11]] * 7)):
                how = {"similarity": similarity, "temperature": 0.5, "exclude": exclude}
                want = non_finite_cases.stats_by_definition(queries, items, targets, **how)
                got = sharded_target_stats(
                    queries, items[first:last], targets, first_id=first, **how
                )
                assert_same_everywhere(got)
                assert torch.equal(got.rank, want[0]), (where, similarity, got.rank, want[0])
                torch.testing.assert_close(got.log_prob, want[1], rtol=3e-6, atol=3e-5)


def check_target_rows(rank: int, ranks: int) -> None:
    """The bits of rows come over: of -0.0, of the smallest number, of every NaN."""
    for dtype in DTYPES:
        items = torch.arange(-80, 80, dtype=torch.int8).repeat(50)[: 20 * 16].view(dtype)
        items = items.view(-1, 4)
        items[:, 0] = -0.0
        size = -(-len(items) // ranks)
        first = min(rank * size, len(items))
        local = items[first : first + size]
        ids = torch.arange(len(items)).flip(0)
        for layout in (local, local.T.contiguous().T):
            got = gather_target_rows(layout, (ids - first).clamp(-1, len(local)), None)
            assert torch.equal(got.view(torch.uint8), items[ids].view(torch.uint8))


def check_groups_and_errors(rank: int, ranks: int) -> None:
    """A table for each pair of ranks; a target that no rank holds, and one that all hold."""
    problem = make("normal", 3, 100, 8, 0)
    targets = torch.tensor([4, 60, 99])
    empty = sharded_target_stats(problem.queries[:0], problem.items, [], first_id=100 * rank)
    assert empty.rank.shape == empty.log_prob.shape == (0,)
    for wrong, first, words in ((100 * ranks, 100 * rank, "0 ranks"), (7, 0, f"{ranks} ranks")):
        if ranks == 1 and words == "1 ranks":
            continue
        try:
            sharded_target_stats(problem.queries, problem.items, [wrong] * 3, first_id=first)
        except ValueError as error:
            assert f"got {wrong}, a row of {words}" in str(error), error
        else:
            raise AssertionError("a target of no rank, or of several, was ranked")
    if ranks == 4:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group, first = groups[rank // 2], rank % 2 * 50
        queries = problem.queries * (1 + rank // 2)
        local = problem.items[first : first + 50]
        got = sharded_target_stats(queries, local, targets, first_id=first, group=group)
        want = target_stats(queries, problem.items, targets)
        assert torch.equal(got.rank, want.rank)
        torch.testing.assert_close(got.log_prob, want.log_prob, rtol=3e-6, atol=3e-5)


def main(rank: int, ranks: int, store: str, dying: int) -> int:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    if dying < 0:
        check_finite(rank, ranks)
        check_non_finite(rank, ranks)
        check_target_rows(rank, ranks)
        check_groups_and_errors(rank, ranks)
        dist.destroy_process_group()
        return 0
    dist.barrier()
    if rank == dying:
        os.kill(os.getpid(), 9)
    begin = time.monotonic()
    try:
        sharded_target_stats(torch.ones(2, 4), torch.ones(5, 4), [0, 7], first_id=5 * rank)
    except RuntimeError as error:
        print(f"{time.monotonic() - begin:.1f} s: {error}")  # noqa: T201
        return 7
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))

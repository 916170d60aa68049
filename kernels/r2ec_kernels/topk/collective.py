"""The one collective of a sharded search, and which ranks do not answer when it fails."""

import itertools
import time
from datetime import timedelta

import torch
import torch.distributed as dist

_POLL = timedelta(seconds=1)
_ANSWER_SECONDS = 4.0  # within which a living rank says that it saw the failure too
_calls = itertools.count()


def gather_keys(keys: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """All ranks' order keys side by side: int64 [B, k] -> [B, ranks * k].

    Raises:
        RuntimeError: the collective failed; names the ranks that do not answer. On CPU a rank that
            died is noticed at once by its neighbours, and by the others within a few seconds.
    """
    if not dist.is_initialized():
        raise RuntimeError("sharded_topk: torch.distributed is not initialised in this process")
    call = next(_calls)
    parts = [torch.empty_like(keys) for _ in range(dist.get_world_size(group))]
    try:
        work = dist.all_gather(parts, keys.contiguous(), group=group, async_op=True)
        if keys.device.type == "cpu":
            _wait(work, call)
        else:
            work.wait()
    except RuntimeError as error:
        silent = _silent_ranks(group, call)
        raise RuntimeError(
            f"sharded_topk: the all-gather failed; ranks that do not answer: {silent}"
        ) from error
    return torch.cat(parts, dim=1)


def _wait(work: dist.Work, call: int) -> None:
    """Wait for the collective, or until another rank reports that it failed."""
    while True:
        try:
            work.wait(_POLL)
            return
        except RuntimeError:
            if work.is_completed() or _store().check([_key(call, "failed")]):
                raise


def _silent_ranks(group: dist.ProcessGroup | None, call: int) -> list[int]:
    """Global ranks of the group that do not report within _ANSWER_SECONDS."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    try:
        store = _store()
        store.set(_key(call, "failed"), "1")
        store.set(_key(call, dist.get_rank()), "1")
        deadline = time.monotonic() + _ANSWER_SECONDS
        silent = list(ranks)
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not store.check([_key(call, rank)])]
            time.sleep(0.05)
        return silent
    except RuntimeError:
        return [0]  # rank 0 holds the store


def _key(call: int, what: int | str) -> str:
    return f"r2ec_kernels/sharded_topk/{call}/{what}"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()

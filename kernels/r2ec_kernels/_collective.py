"""The collectives of sharded ops, and which ranks do not answer when one fails."""

import itertools
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

_POLL = timedelta(seconds=1)
_ANSWER_SECONDS = 4.0  # within which a living rank says that it saw the failure too
_calls = itertools.count()


def all_gather(op: str, part: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """All ranks' ``part``, of one shape and type, in the order of the ranks.

    Args:
        op: who asks, for messages.
        group: the process group; None is the default group.

    Raises:
        RuntimeError: torch.distributed is not initialised, or the collective failed; names the
            ranks that do not answer. On CPU a rank that died is noticed at once by its neighbours,
            and by the others within a few seconds.
    """
    _check_initialised(op)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    own = part.contiguous()
    _run(op, group, own, lambda: dist.all_gather(parts, own, group=group, async_op=True))
    return parts


def all_reduce(op: str, values: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Replace ``values``, contiguous, by their sum over the ranks; else as ``all_gather``."""
    _check_initialised(op)
    _run(op, group, values, lambda: dist.all_reduce(values, group=group, async_op=True))


def _check_initialised(op: str) -> None:
    if not dist.is_initialized():
        raise RuntimeError(f"{op}: torch.distributed is not initialised in this process")


def _run(
    op: str, group: dist.ProcessGroup | None, own: torch.Tensor, start: Callable[[], dist.Work]
) -> None:
    """Run one collective of the tensor ``own`` to its end."""
    call = next(_calls)
    try:
        work = start()
        if own.device.type == "cpu":
            _wait(work, call)
        else:
            work.wait()
    except RuntimeError as error:
        silent = _silent_ranks(group, call)
        raise RuntimeError(
            f"{op}: the collective failed; ranks that do not answer: {silent}"
        ) from error


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
    return f"r2ec_kernels/collective/{call}/{what}"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()

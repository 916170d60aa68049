"""What the trainer needs of several processes: gradients and candidates summed and gathered.

Each process trains its own users. Gradients of a step are *summed* over processes, because the
loss is already divided by the counts of the whole step (docs/method.md#one-step). Every function is
the identity in a single process, and raises PeerError where another process is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

Items = TypeVar("Items", np.ndarray, Sequence[Any])


class PeerError(RuntimeError):
    """Another process of the run failed, died or does not answer."""


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise lost_peer(error) from error


def lost_peer(error: BaseException) -> PeerError:
    """What a failed exchange means for the run."""
    return PeerError(
        "another process of the run died, or did not answer within ddp_timeout seconds "
        f"({str(error).splitlines()[0]}); start the run again with resume_from_checkpoint=latest"
    )


def is_exchange_error(error: BaseException) -> bool:
    """Whether torch.distributed raised ``error``."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_objects(value: object) -> list[Any]:
    """``value`` of every process, in rank order."""
    _, size = world()
    if size == 1:
        return [value]
    out: list[Any] = [None] * size
    with _exchange():
        dist.all_gather_object(out, value)
    return out


def own_part(items: Items) -> Items:
    """This process's contiguous part of ``items``; the parts of all processes make the whole."""
    rank, size = world()
    return items[len(items) * rank // size : len(items) * (rank + 1) // size]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows [m_r, ...] of every process, concatenated in rank order; no gradient."""
    _, size = world()
    if size == 1:
        return rows.detach()
    counts = gather_objects(len(rows))
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(size)]
    with _exchange():
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over processes, in place."""
    if world()[1] > 1:
        with _exchange():
            dist.all_reduce(tensor)
    return tensor


def max_(tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise largest ``tensor`` of all processes, in place."""
    if world()[1] > 1:
        with _exchange():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients of ``parameters`` over processes; a missing one counts as zero.

    Those of sharded parameters are summed already, by the backward pass.
    """
    if world()[1] == 1:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        sum_(parameter.grad)


def any_(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    return most(int(flag)) > 0


def most(count: int) -> int:
    """The largest ``count`` of all processes."""
    if world()[1] == 1:
        return count
    value = torch.tensor(count, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    with _exchange():
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)

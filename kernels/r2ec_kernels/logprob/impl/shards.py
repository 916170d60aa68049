"""A vocabulary whose rows are divided over processes: targets, and one softmax out of several."""

import torch
import torch.distributed as dist

from .common import HeadSettings, OnlineSoftmax

ELSEWHERE = 1 << 62  # a counted target that no row of this process is


def local_targets(targets: torch.Tensor, first_token: int, rows: int) -> torch.Tensor:
    """Targets as rows of the shard that begins at ``first_token``; uncounted ones as they are."""
    local = targets - first_token
    here = (local >= 0) & (local < rows)
    return torch.where(targets < 0, targets, torch.where(here, local, ELSEWHERE))


def merge(found: OnlineSoftmax, settings: HeadSettings) -> OnlineSoftmax:
    """The whole vocabulary's m, l, weighted and picked from every process's; acc, used up, stays
    the sum over this process's rows, relative to the new m. Without a group: as it is.

    Two all-reduces, of the maxima and of the sums. Every process gives as many rows.
    """
    if settings.group is None:
        return found
    m = found.m.clone()
    dist.all_reduce(m, op=dist.ReduceOp.MAX, group=settings.group)
    lowered = (found.m - m).clamp_(min=torch.finfo(m.dtype).min)  # -inf * 0 is NaN
    scale = lowered.exp2()
    parts = [found.l * scale, found.picked]
    if found.weighted is not None:
        parts.append((found.weighted.view_as(m) + found.l * lowered) * scale)
    sums = torch.stack(parts)
    dist.all_reduce(sums, group=settings.group)
    if found.acc is not None:
        found.acc.mul_(scale[..., None])
    weighted = None if found.weighted is None else sums[2].view_as(found.weighted)
    return OnlineSoftmax(m, sums[0], weighted, sums[1], found.acc)


def sum_over_shards(hidden_gradient: torch.Tensor, settings: HeadSettings) -> torch.Tensor:
    """The gradient of the states, [n, d], from every process's part of it; in place."""
    if settings.group is not None:
        dist.all_reduce(hidden_gradient, group=settings.group)
    return hidden_gradient

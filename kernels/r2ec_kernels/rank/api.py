"""Rank and log-probability of each query's target among all items of a table."""

import importlib
from typing import NamedTuple

import torch

from .._checks import (
    MAX_ITEMS,
    Ids,
    as_first_id,
    as_ids,
    check_ids,
    check_scoring,
    check_shape,
    check_vectors,
    check_widths,
)
from .._dispatch import resolve
from .._exact.excluded import (
    Exclude,
    TensorExclude,
    as_exclude,
    check_exclude,
    exclude_part,
    normalize_exclude,
    split_exclude,
)
from .._exact.included import Include, as_include, check_include, include_part, normalize_include

_AVAILABLE = frozenset({"triton", "torch", "reference"})


class TargetStats(NamedTuple):
    """What :func:`target_stats` and :func:`sharded_target_stats` return."""

    rank: torch.Tensor  # int64 [B], from 1
    log_prob: torch.Tensor  # float32 [B]


def target_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: Ids,
    *,
    similarity: str = "dot",
    temperature: float = 1.0,
    exclude: Exclude = None,
    include: Include = None,
    impl: str = "auto",
) -> TargetStats:
    """Rank and log-probability of each query's target among all items, in one pass.

    Equal to, with canonical scores ``s`` [B, N] and -inf for the items that are excluded, or not
    included::

        rank = 1 + (number of items before the target in a stable descending sort of s)
        log_prob = log_softmax(s, dim=-1).gather(1, targets[:, None])[:, 0]

    A target whose score is NaN has the last place, the number of items that compete, and
    log_prob -inf; other items with such a score do not compete. Items at +inf share the mass
    (docs/kernels/rank.md).

    The rank is exact: it is the target's position, from 1, in ``item_topk(k=N)``. The target
    competes always. Memory: O(B + block), no [B, N] scores.

    Args:
        queries: [B, d].
        items: [N, d].
        targets: int64 [B] in 0..N-1, or an array or list of them.
        similarity: "dot", "cosine" or "l2" (minus the unsquared distance).
        temperature: scores are divided by it, > 0.
        exclude: items that do not compete: padded int64 [B, L] with -1 for none, (values [E],
            offsets [B+1]), or a list of each query's ids. Numpy arrays too.
        include: the only items that compete, but for those that ``exclude`` takes: ids int64 [S],
            in any order, repeats allowed, or a mask bool [N]; tensors, numpy arrays, or a list of
            ids. One list for the whole batch; None: all items.
        impl: "auto", "triton", "torch" or "reference".

    Raises:
        TypeError, ValueError: wrong type, shape or range.
        RuntimeError: ``impl`` cannot run here.
    """
    check_widths("queries", queries, "items", items, rows=("B", "N"))
    check_scoring(similarity, temperature)
    wanted = as_ids("targets", targets, device=queries.device)
    check_ids("targets", wanted, queries.shape[0], 0, items.shape[0])
    given = as_exclude(exclude, queries.shape[0])
    check_exclude(given, queries.shape[0])
    values, offsets = split_exclude(given)
    included = as_include(include)
    check_include(included, items.shape[0])
    scoring, lists = (similarity, float(temperature)), (values, offsets, included)
    rank, log_prob = torch.ops.r2ec_kernels.target_stats(
        queries.detach(), items.detach(), wanted, *scoring, *lists, impl
    )
    return TargetStats(rank, log_prob)


def sharded_target_stats(
    queries: torch.Tensor,
    local_items: torch.Tensor,
    targets: Ids,
    *,
    first_id: int,
    similarity: str = "dot",
    temperature: float = 1.0,
    exclude: Exclude = None,
    include: Include = None,
    target_rows: torch.Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> TargetStats:
    """``target_stats`` over a table whose rows are split over the ranks of a process group.

    Every rank compares its own rows with the targets; one all-gather of 24 bytes a query follows.
    All get the whole table's ranks, and its log-probabilities to float32's rounding.

    Args:
        queries: [B, d], the same on every rank.
        local_items: [n, d], rows ``first_id`` .. ``first_id + n - 1`` of the table; n may be 0.
        targets: global ids int64 [B], or an array or list of them, the same on every rank.
        first_id: id of the first local row.
        similarity, temperature: as for ``target_stats``, the same on every rank.
        exclude: global ids, as for ``target_stats``; ids of other ranks' rows are ignored here.
        include: global ids, or a mask of all ids, bool [N], as for ``target_stats``; the same on
            every rank.
        target_rows: [B, d], the targets' rows of the table, bit for bit, on every rank. None, on
            every rank: they come from those that hold them, by one all-reduce.
        group: the process group; None is the default group.

    Raises:
        TypeError, ValueError: wrong type, shape or range, or a target that is a row of no rank or
            of several. Targets that live on a GPU are checked only under ``R2EC_CHECK=1``; one that
            no rank holds has rank -1 and log-probability NaN there.
        RuntimeError: the collective failed; the message names the ranks that do not answer.
    """
    _check_part(queries, local_items, target_rows)
    check_scoring(similarity, temperature)
    batch, count = len(queries), len(local_items)
    first_id = as_first_id(first_id, count)
    wanted = as_ids("targets", targets, device=queries.device)
    check_ids("targets", wanted, batch, 0, MAX_ITEMS)
    given = as_exclude(exclude, batch)
    check_exclude(given, batch)
    scoring = similarity, float(temperature)
    lists = exclude_part(given, first_id, count), include_part(include, first_id, count)
    from . import sharded

    at = (wanted.to(queries.device) - first_id).clamp(-1, count)
    rows, own = local_items.detach(), target_rows
    if own is None:
        own = sharded.gather_target_rows(rows, at, group)
    if count:
        rank, log_prob = run_target_stats(
            queries.detach(), rows, at, *scoring, *lists, "auto", own.detach()
        )
    else:  # a target by itself
        rank, log_prob = torch.ones_like(at), torch.zeros(batch, device=at.device)
    return TargetStats(
        *sharded.merge_parts(rank, log_prob, sharded.is_held(at, count), wanted, group)
    )


def _check_part(
    queries: torch.Tensor, local_items: torch.Tensor, target_rows: torch.Tensor | None
) -> None:
    """Raise unless queries [B, d], a part of a table [n, d] and the targets' rows [B, d] of the
    table's type, or None, fit together."""
    check_vectors("queries", queries)
    batch, d = queries.shape
    check_vectors("local_items", local_items, d=d, device=queries.device)
    if target_rows is None:
        return
    check_vectors("target_rows", target_rows, d=d, device=queries.device)
    check_shape("target_rows", target_rows, [batch, d])
    if target_rows.dtype != local_items.dtype:
        raise TypeError(f"target_rows: expected {local_items.dtype}, got {target_rows.dtype}")


def run_target_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    exclude: TensorExclude,
    include: torch.Tensor | None,
    impl: str,
    target_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) by the implementation that ``impl`` names: the
    body of the op ``r2ec_kernels::target_stats``.

    target_rows: [B, d], the targets' rows where some are no items: -1 stands before all items, N
    behind them.
    """
    name = resolve(impl, queries.device, "target_stats", _AVAILABLE)
    batch, count = queries.shape[0], items.shape[0]
    included = normalize_include(include, count, queries.device)
    if name == "triton":
        from .._scan.triton_exclusions import exclusions
        from .impl import triton as triton_impl

        excluded = exclusions(exclude, batch, count, queries.device)
        return triton_impl.target_stats(
            queries, items, targets, similarity, temperature, excluded, included, target_rows
        )
    values, offsets = normalize_exclude(exclude, batch, count, queries.device)
    implementation = importlib.import_module(f".impl.{name}", __package__)
    return implementation.target_stats(
        queries, items, targets, similarity, temperature, values, offsets, included, target_rows
    )

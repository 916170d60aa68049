"""Rank and log-probability of each query's target among all items of a table."""

import importlib
from typing import NamedTuple

import torch

from .._checks import Ids, as_ids, check_ids, check_scoring, check_widths
from .._dispatch import resolve
from .._exact.excluded import (
    Exclude,
    TensorExclude,
    as_exclude,
    check_exclude,
    normalize_exclude,
    split_exclude,
)
from .._exact.included import Include, as_include, check_include, normalize_include

_AVAILABLE = frozenset({"triton", "torch", "reference"})


class TargetStats(NamedTuple):
    """What :func:`target_stats` returns."""

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


def run_target_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    exclude: TensorExclude,
    include: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) by the implementation that ``impl`` names: the
    body of the op ``r2ec_kernels::target_stats``."""
    name = resolve(impl, queries.device, "target_stats", _AVAILABLE)
    batch, count = queries.shape[0], items.shape[0]
    included = normalize_include(include, count, queries.device)
    if name == "triton":
        from .._scan.triton_exclusions import exclusions
        from .impl import triton as triton_impl

        excluded = exclusions(exclude, batch, count, queries.device)
        return triton_impl.target_stats(
            queries, items, targets, similarity, temperature, excluded, included
        )
    values, offsets = normalize_exclude(exclude, batch, count, queries.device)
    implementation = importlib.import_module(f".impl.{name}", __package__)
    return implementation.target_stats(
        queries, items, targets, similarity, temperature, values, offsets, included
    )

"""Exact top-K: which items of a table score highest for each query."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import _dispatch
from .._checks import (
    as_first_id,
    as_int,
    check_float,
    check_scoring,
    check_shape,
    check_vectors,
)
from .._exact.excluded import (
    Exclude,
    TensorExclude,
    as_exclude,
    check_exclude,
    exclude_part,
    split_exclude,
)
from .._exact.included import Include, as_include, check_include, include_part
from .._exact.scores import PADDING_KEY, from_order_keys, order_keys
from .impl import reference
from .impl import torch as torch_impl

_AVAILABLE = frozenset({"triton", "torch", "reference"})


class TopK(NamedTuple):
    """scores float32 [B, k] and indices int64 [B, k]; unused places hold (-inf, -1)."""

    scores: torch.Tensor
    indices: torch.Tensor


def item_topk(
    queries: torch.Tensor,
    items: torch.Tensor,
    k: int,
    *,
    similarity: str = "dot",
    temperature: float = 1.0,
    exclude: Exclude = None,
    include: Include = None,
    impl: str = "auto",
) -> TopK:
    """The k items with the highest score for each query, exactly.

    Equal to a stable descending sort of the canonical scores (float64 similarity / temperature,
    rounded once to float32): equal scores come lower index first. An item whose score is NaN is
    never returned; infinite scores are ordinary ones. No score matrix is stored:
    memory above the inputs is O(B k + block).

    Args:
        queries: [B, d], float32, bfloat16 or float16.
        items: [N, d], one of the same types.
        k: at least 0; more than N is padded with (-inf, -1).
        similarity: "dot", "cosine" (a zero vector scores 0) or "l2" (minus the distance).
        temperature: positive.
        exclude: items never returned: int64 [B, L] padded with -1; the pair (values int64 [E],
            offsets int64 [B+1]), a tuple; or a list of each query's ids. Numpy arrays too.
        include: the only items returned, of which ``exclude`` still takes its own: ids int64 [S],
            in any order, repeats allowed, or a mask bool [N]; tensors, numpy arrays, or a list of
            ids. One list for the whole batch; None: all items.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        ``TopK(scores float32 [B, k], indices int64 [B, k])``. No gradient flows through it.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.
        RuntimeError: ``impl`` names an implementation that cannot run here.
    """
    check_vectors("queries", queries)
    check_vectors("items", items, d=queries.shape[1], device=queries.device)
    k = check_search(k, similarity, temperature)
    given = as_exclude(exclude, queries.shape[0])
    check_exclude(given, queries.shape[0])
    values, offsets = split_exclude(given)
    wanted = as_include(include)
    check_include(wanted, items.shape[0])
    scores, indices = torch.ops.r2ec_kernels.item_topk(
        queries.detach(),
        items.detach(),
        k,
        similarity,
        float(temperature),
        values,
        offsets,
        wanted,
        impl,
    )
    return TopK(scores, indices)


def sharded_topk(
    queries: torch.Tensor,
    local_items: torch.Tensor,
    k: int,
    *,
    first_id: int,
    similarity: str = "dot",
    temperature: float = 1.0,
    exclude: Exclude = None,
    include: Include = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> TopK:
    """``item_topk`` over a table whose rows are split over the ranks of a process group.

    Every rank searches its own rows; one all-gather of k keys a rank (score and id in 64 bits) and
    a merge by (score descending, id ascending) follow. All ranks get the result of the whole table,
    bit for bit the single-process one.

    Args:
        queries: [B, d], the same on every rank.
        local_items: [n, d], rows ``first_id`` .. ``first_id + n - 1`` of the table.
        k, similarity, temperature: as for ``item_topk``, the same on every rank.
        first_id: id of the first local row.
        exclude: global ids, as for ``item_topk``; ids of other ranks' rows are ignored here.
        include: global ids, or a mask of all ids, bool [N], as for ``item_topk``; the same on every
            rank.
        group: the process group; None is the default group.

    Returns:
        ``TopK`` with global ids.

    Raises:
        TypeError, ValueError: as ``item_topk``.
        RuntimeError: the collective failed; the message names the ranks that do not answer.
    """
    check_vectors("queries", queries)
    check_vectors("local_items", local_items, d=queries.shape[1], device=queries.device)
    k = check_search(k, similarity, temperature)
    first_id = as_first_id(first_id, local_items.shape[0])
    given = as_exclude(exclude, queries.shape[0])
    check_exclude(given, queries.shape[0])
    scores, ids = item_topk(
        queries,
        local_items,
        k,
        similarity=similarity,
        temperature=temperature,
        exclude=exclude_part(given, first_id, local_items.shape[0]),
        include=include_part(include, first_id, local_items.shape[0]),
    )
    keys = order_keys(scores, ids + first_id).masked_fill(ids < 0, PADDING_KEY)
    from .._collective import all_gather

    gathered = torch.cat(all_gather("sharded_topk", keys, group), dim=1)
    return TopK(*from_order_keys(gathered.topk(k, dim=1).values))


def merge_topk(parts: Sequence[TopK], k: int) -> TopK:
    """The k best of searches of parts of a table: ``sharded_topk`` without a process group.

    Where every part was searched for at least min(k, its rows) items, the result is bit for bit
    that of the whole table.

    Args:
        parts: one or more, each scores [B, k_i] and indices [B, k_i] (global ids; -1 for none),
            as ``item_topk`` returns them.
        k: items to keep, padded with (-1, -inf) where the parts have fewer.

    Raises:
        TypeError, ValueError: no part, or parts of different B, shapes or types.
    """
    k = check_search(k, "dot", 1.0)
    if not parts:
        raise ValueError("parts: expected at least one TopK, got none")
    for place, (scores, ids) in enumerate(parts):
        check_float(f"parts[{place}].scores", scores, 2)
        check_shape(f"parts[{place}].scores", scores, [len(parts[0].scores), scores.shape[1]])
        check_shape(f"parts[{place}].indices", ids, list(scores.shape))
    keys = [order_keys(s, i).masked_fill(i < 0, PADDING_KEY) for s, i in parts]
    found = torch.cat([*keys, keys[0].new_full((len(keys[0]), k), PADDING_KEY)], dim=1)
    return TopK(*from_order_keys(found.topk(k, dim=1).values))


def check_search(k: int, similarity: str, temperature: float) -> int:
    """``k`` as an int; raises unless the settings of a search are valid."""
    k = as_int("k", k, 0)
    check_scoring(similarity, temperature)
    return k


def run_item_topk(
    queries: torch.Tensor,
    items: torch.Tensor,
    k: int,
    similarity: str,
    temperature: float,
    exclude: TensorExclude,
    include: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores float32 [B, k] and indices int64 [B, k] by the implementation that ``impl`` names: the
    body of the op ``r2ec_kernels::item_topk``."""
    name = _dispatch.resolve(impl, items.device, "item_topk", _AVAILABLE)
    if _dispatch.checks_enabled():
        for argument, vectors in (("queries", queries), ("items", items)):
            if not bool(torch.isfinite(vectors).all()):
                raise ValueError(f"{argument}: expected finite values, got NaN or infinity")
    if name == "triton":
        from .impl import triton as triton_impl

        return triton_impl.item_topk(queries, items, k, similarity, temperature, exclude, include)
    compute = reference.item_topk if name == "reference" else torch_impl.item_topk
    return compute(queries, items, k, similarity, temperature, exclude, include)

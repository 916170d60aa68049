"""item_topk on the tensor cores: one scan that keeps two scores a group of rows, then certainty.

With e the error bound of the scan (``triton_kernels``):

- cut = (k-th largest group maximum) - 2 e: no row whose score is below it can be among the best k;
- a group whose maximum reaches the cut gives one candidate; one whose second score reaches it too
  may hide more: all of its rows are candidates;
- candidates are re-scored exactly and sorted.

Capacities are fixed, so nothing waits for the host: 2 k + 64 candidates a query and the rows of 16
groups, above the scan's 8 B N / group bytes. A query that does not fit is reported as unresolved
and takes the dense path.
"""

import torch

from ..._dispatch import is_capturing
from ..._exact.bounds import Queries, prepare_queries
from ..._exact.excluded import ExcludedPairs, TensorExclude, normalize_exclude, split_exclude
from ..._exact.scores import PADDING_KEY, canonical_scores, from_order_keys, order_keys
from ..._exact.table import Table
from .common import SearchStats, dense_topk
from .triton_kernels import (
    Scanned,
    aot_configs,
    group_best,
    group_size,
    scan_rows,
    unpack,
)

__all__ = ["aot_configs", "certified_topk", "item_topk"]

_WHOLE_GROUPS = 16  # of a query, whose rows may all be candidates
_DENSE_SHARE = 64  # k above rows / 64 takes the dense path
_GATHERED = 1 << 24  # elements of rows gathered at once


def certified_topk(
    scanned: Scanned | None,  # None for an empty table
    query: Queries,
    table: Table,
    k: int,
    excluded: ExcludedPairs,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, SearchStats]:
    """The k best rows of ``table`` for each query, exactly: see ``common.certified_topk``.

    ``scanned``: what the kernel multiplies; None only for an empty table.

    Under CUDA-graph capture no host decision is possible: a query that needs the dense path then
    returns NaN scores and ids -1, and is to be searched again outside the graph.
    """
    batch, count = query.original.shape[0], table.rows.shape[0]
    device = query.original.device
    keys = torch.full((batch, k), PADDING_KEY, dtype=torch.int64, device=device)
    width = min(k, count)
    if batch == 0 or width == 0:
        return *from_order_keys(keys), SearchStats("dense", batch, 0.0, 0, 0)
    if count < _DENSE_SHARE * width:
        keys[:, :width] = dense_topk(table, query, width, excluded)
        return *from_order_keys(keys), SearchStats("dense", batch, 0.0, 0, batch)
    assert scanned is not None  # ``count`` > 0
    found, unresolved, candidates, whole = _resolve(scanned, query, table, width, excluded)
    keys[:, :width] = found
    if is_capturing(device):
        scores, ids = from_order_keys(keys.masked_fill(unresolved[:, None], PADDING_KEY))
        scores = scores.masked_fill(unresolved[:, None], float("nan"))
        return scores, ids, SearchStats(name, batch, float("nan"), -1, -1)
    num_dense = int(unresolved.sum())
    if num_dense:
        keys[unresolved, :width] = dense_topk(
            table, query[unresolved], width, excluded.pick(unresolved)
        )
    kept = ~unresolved
    ratio = int(candidates[kept].sum()) / max(1, (batch - num_dense) * width)
    stats = SearchStats(
        name if num_dense < batch else "dense", batch, ratio, int(whole[kept].sum()), num_dense
    )
    return *from_order_keys(keys), stats


def _resolve(
    scanned: Scanned, query: Queries, table: Table, k: int, excluded: ExcludedPairs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order keys [B, k]; queries that need the dense path, candidates, whole groups: [B] each."""
    rows = table.rows
    group = group_size(rows.shape[0], k)
    first, second = group_best(scanned, group, excluded.rows, excluded.of)
    width = min(first.shape[1], 2 * k + 64)
    value, at = unpack(first, group).topk(width, dim=1)
    cut = value[:, k - 1] - 2 * scanned.error
    reach = value >= cut[:, None]
    hidden = reach & (unpack(second.gather(1, at), group) >= cut[:, None])
    unresolved = ~torch.isfinite(cut) | query.dense
    if width < first.shape[1]:
        unresolved |= reach[:, -1]
    slots = min(_WHOLE_GROUPS, width)
    unresolved |= hidden.sum(1) > slots
    row = at * group + (first.gather(1, at) & (group - 1))
    _, chosen = hidden.to(torch.int32).topk(slots, dim=1)
    inside = torch.arange(group, device=rows.device)
    within = (at.gather(1, chosen)[:, :, None] * group + inside).flatten(1)
    valid = hidden.gather(1, chosen).repeat_interleave(group, dim=1) & (within < rows.shape[0])
    within = within.clamp_max(rows.shape[0] - 1)
    if not excluded.empty:
        of = torch.arange(within.shape[0], device=rows.device)[:, None].expand_as(within)
        valid &= ~excluded.holds(of, within)
    candidate = torch.cat([row.clamp_max(rows.shape[0] - 1), within], 1)
    valid = torch.cat([reach & ~hidden, valid], 1)
    keys = _canonical_keys(query, table, candidate, valid).topk(k, dim=1).values
    scores, _ = from_order_keys(keys)
    return keys, unresolved | torch.isinf(scores).any(1), valid.sum(1), hidden.sum(1)


def _canonical_keys(
    query: Queries, table: Table, candidate: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Order keys of candidate rows [B, C]; PADDING_KEY where not valid."""
    batch, width = candidate.shape
    rows = table.rows
    keys = torch.full_like(candidate, PADDING_KEY)
    step = max(1, _GATHERED // max(1, width * rows.shape[1]))
    for start in range(0, batch, step):
        part = slice(start, min(batch, start + step))
        scores = canonical_scores(
            query.original[part], rows[candidate[part]], query.similarity, query.temperature
        )
        keys[part] = order_keys(scores, table.ids_of(candidate[part])).masked_fill(
            ~valid[part], PADDING_KEY
        )
    return keys


def item_topk(
    queries: torch.Tensor,
    items: torch.Tensor,
    k: int,
    similarity: str,
    temperature: float,
    exclude: TensorExclude,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores float32 [B, k], indices int64 [B, k]); padded with (-inf, -1)."""
    values, offsets = _pairs(exclude, queries.shape[0], items.shape[0], items.device)
    query = prepare_queries(queries, similarity, temperature)
    if items.stride(-1) != 1:
        items = items.contiguous()
    scores, ids, _ = certified_topk(
        scan_rows(query, items, None) if items.shape[0] else None,
        query,
        Table(items),
        k,
        ExcludedPairs.from_offsets(values, offsets),
        "triton",
    )
    return scores, ids


def _pairs(
    exclude: TensorExclude, batch: int, num_items: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``normalize_exclude``, without waiting for the device while a graph is captured."""
    if not is_capturing(device):
        return normalize_exclude(exclude, batch, num_items, device)
    values, offsets = split_exclude(exclude)
    if values is None:
        zero = torch.zeros(batch + 1, dtype=torch.int64, device=device)
        return zero[:0], zero
    if offsets is None:
        offsets = torch.arange(batch + 1, device=device) * values.shape[1]
    return values.flatten().long(), offsets.long()

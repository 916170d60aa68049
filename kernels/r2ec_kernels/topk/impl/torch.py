"""item_topk over a plain table in plain torch: on CPUs in a handful of compiled calls where those
can tell (``_scan.row_search``), else by the certified search (``common``) with the float32 scan of
the rows themselves (``_scan.float32``). Memory bounded, any device."""

from functools import partial

import torch

from ..._exact.bounds import prepare_queries
from ..._exact.excluded import ExcludedPairs, TensorExclude, normalize_exclude
from ..._exact.included import normalize_include, restrict
from ..._exact.table import Table
from ..._scan import row_search
from ..._scan.float32 import Float32Scan
from .common import certified_topk
from .pool import pool_limit


def item_topk(
    queries: torch.Tensor,
    items: torch.Tensor,
    k: int,
    similarity: str,
    temperature: float,
    exclude: TensorExclude,
    include: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores float32 [B, k], indices int64 [B, k]); padded with (-inf, -1)."""
    values = offsets = None
    if exclude is not None:
        values, offsets = normalize_exclude(exclude, len(queries), len(items), items.device)
    if include is None and row_search.can_search(items, queries, k):
        found = row_search.search(
            items,
            queries,
            k,
            similarity=similarity,
            temperature=temperature,
            limit=pool_limit(k),
            excluded=values,
            offsets=offsets,
        )
        if found is not None:
            return found.scores, found.ids
    if values is None or offsets is None:
        excluded = ExcludedPairs.none(queries.shape[0], items.device)
    else:
        excluded = ExcludedPairs.from_offsets(values, offsets)
    included = normalize_include(include, items.shape[0], items.device)
    table, excluded, _ = restrict(Table(items), included, excluded)
    query = prepare_queries(queries, similarity, temperature)
    scan = partial(Float32Scan, table.rows, None)
    scores, ids, _ = certified_topk(table, [scan], query, k, excluded)
    return scores, ids

"""item_topk over a plain table in plain torch: the certified search (``common``) with the float32
scan of the rows themselves (``_scan.float32``). Memory bounded, any device."""

from functools import partial

import torch

from ..._exact.bounds import prepare_queries
from ..._exact.excluded import ExcludedPairs, TensorExclude, normalize_exclude
from ..._exact.included import normalize_include, restrict
from ..._exact.table import Table
from ..._scan.float32 import Float32Scan
from .common import certified_topk


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
    if exclude is None:
        excluded = ExcludedPairs.none(queries.shape[0], items.device)
    else:
        values, offsets = normalize_exclude(exclude, len(queries), len(items), items.device)
        excluded = ExcludedPairs.from_offsets(values, offsets)
    included = normalize_include(include, items.shape[0], items.device)
    table, excluded, _ = restrict(Table(items), included, excluded)
    query = prepare_queries(queries, similarity, temperature)
    scan = partial(Float32Scan, table.rows, None)
    scores, ids, _ = certified_topk(table, [scan], query, k, excluded)
    return scores, ids

"""item_topk as its definition: every canonical score, sorted. Materialises [B, N]."""

import torch

from ..._exact.excluded import ExcludedPairs, TensorExclude, normalize_exclude
from ..._exact.included import as_mask, normalize_include
from ..._exact.scores import canonical_scores


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
    batch, count = queries.shape[0], items.shape[0]
    scores = canonical_scores(queries, items, similarity, temperature)
    values, offsets = normalize_exclude(exclude, batch, count, queries.device)
    kept = ~scores.isnan()  # those cannot be compared
    excluded = ExcludedPairs.from_offsets(values, offsets)
    kept[excluded.of, excluded.rows] = False
    included = normalize_include(include, count, queries.device)
    if included is not None:
        kept &= as_mask(included, count)
    # Items that are not kept go last, even behind one whose own score is -inf: two stable sorts.
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    by_kept = torch.argsort(kept.gather(1, order).int(), dim=1, descending=True, stable=True)
    order = order.gather(1, by_kept)[:, :k]
    alive = kept.gather(1, order)
    top_scores = torch.full((batch, k), float("-inf"), device=queries.device)
    top_ids = torch.full((batch, k), -1, dtype=torch.int64, device=queries.device)
    width = order.shape[1]
    top_scores[:, :width] = scores.gather(1, order).masked_fill(~alive, float("-inf"))
    top_ids[:, :width] = order.masked_fill(~alive, -1)
    return top_scores, top_ids

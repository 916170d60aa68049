"""What an index does on a CPU, and wherever torch runs: a search of the rows in a handful of calls
where that is fastest, else a certified search by the scan that is."""

import time
from collections.abc import Callable

import torch

from .._exact.bounds import prepare_queries
from .._exact.excluded import TensorExclude
from .._scan import row_search
from ..topk.impl.common import SearchStats, certified_topk
from ..topk.impl.pool import pool_limit
from .scans import ScanChoice
from .selection import excluded_rows, selected
from .storage import Storage

Searched = tuple[torch.Tensor, torch.Tensor, Callable[[], SearchStats]]


def search_storage(
    storage: Storage,
    scans: ScanChoice,
    queries: torch.Tensor,
    k: int,
    temperature: float,
    exclude: TensorExclude,
    include: torch.Tensor | None,
) -> Searched:
    """Scores float32 [B, k] and ids int64 [B, k] of the k best rows, and what gives the search's
    statistics."""
    if include is not None or not storage.size or not len(queries):
        return _certified(storage, scans, queries, k, temperature, exclude, include, None)
    by_rows = row_search.can_search(storage.live("rows"), queries, k)
    choice = scans.choose(queries, k, temperature, by_rows)
    began = time.perf_counter()
    found = None
    if choice.by_rows:
        found = _search_rows(storage, scans, queries, k, temperature, exclude)
    if found is None:
        chosen = choice.product
        found = _certified(storage, scans, queries, k, temperature, exclude, None, chosen)
    choice.took(time.perf_counter() - began)
    return found


def _certified(
    storage: Storage,
    scans: ScanChoice,
    queries: torch.Tensor,
    k: int,
    temperature: float,
    exclude: TensorExclude,
    include: torch.Tensor | None,
    chosen: str | None,
) -> Searched:
    """The same by ``certified_topk``; chosen: the product to scan with, if that is known."""
    table, excluded, _ = selected(storage, exclude, include, queries.shape[0])
    query = prepare_queries(queries, storage.similarity, temperature)
    product, made = scans.of_search(query, table, k, chosen)
    scores, ids, stats = certified_topk(table, made, query, k, excluded)
    scans.observe(product, stats)
    return scores, ids, lambda: stats


def _search_rows(
    storage: Storage,
    scans: ScanChoice,
    queries: torch.Tensor,
    k: int,
    temperature: float,
    exclude: TensorExclude,
) -> Searched | None:
    """The same by ``row_search``; None where it cannot tell."""
    excluded, offsets = excluded_rows(storage, exclude, len(queries))
    found = row_search.search(
        storage.live("rows"),
        queries,
        k,
        similarity=storage.similarity,
        temperature=temperature,
        limit=pool_limit(k),
        norms=storage.live("norm"),
        ids=storage.live("ids"),
        excluded=excluded,
        offsets=offsets,
    )
    scans.searched_rows(found is not None)
    if found is None:
        return None
    stats = SearchStats(
        scan="float32",
        queries=len(queries),
        candidates_per_k=found.candidates / (len(queries) * k),
        rescanned_groups=found.met,
        dense_rows=0,
    )
    return found.scores, found.ids, lambda: stats

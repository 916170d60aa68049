"""item_topk on the tensor cores: one scan that keeps two scores a group of rows, then certainty.

    direction    what the rows of a plain table share                  (``direction``)
    prepare      queries in the scan's type, and their bounds          (``_scan.triton_queries``)
    group_best   the two best scores of every group of rows            (``scan``)
    reach        which rows may be among the k best                    (``candidates``)
    rescore      their canonical scores; all rows where that is needed (``rescore``)

Every step is a launch or two, whatever the batch, and nothing waits for the host, under CUDA-graph
capture neither. Memory above the inputs: 8 B N / group bytes of the scan, and 12 a place of a
query's list (``candidates.capacity_of``), in parts of the batch where that is much.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from ...._exact.excluded import TensorExclude
from ...._exact.included import as_mask, gather, is_gathered, normalize_include
from ...._exact.table import Table
from ...._scan.triton_exclusions import Exclusions, exclusions
from ...._scan.triton_queries import DeviceQueries
from ..common import SearchStats
from . import candidates, rescore
from .direction import prepare_rows
from .groups import Scanned, group_size
from .scan import group_best

__all__ = ["aot_configs", "item_topk", "search"]

_DENSE_SHARE = 64  # k above rows / 64: all rows are rescored
_LIST_BYTES = 1 << 29  # of the lists of a part of the batch
_PLACE_BYTES = 8 + 4 + 4 + 8  # of a place: its key, row, group and room for the selection


def search(
    scanned: Scanned,
    query: DeviceQueries,
    table: Table,
    k: int,
    excluded: Exclusions | None,
    name: str,
    place: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Callable[[], SearchStats]]:
    """The k best rows of ``table`` for each query, exactly.

    Args:
        scanned: what the kernel multiplies for the rows of the table, those that it does not allow
            among them.
        query: the prepared batch.
        name: of the scan, for the statistics.
        place: int64, the row of each id that may be excluded; None: ids are rows.

    Returns scores float32 [B, k] and ids int64 [B, k], padded with (-inf, -1), and what reads the
    statistics from the device.
    """
    batch, count = len(query), len(table)
    width = min(k, count)
    if batch == 0 or width == 0:
        scores = torch.full((batch, k), float("-inf"), device=table.rows.device)
        ids = torch.full((batch, k), -1, dtype=torch.int64, device=table.rows.device)
        return scores, ids, lambda: SearchStats("dense", batch, 0.0, 0, 0)
    if table.allowed is not None:
        scanned = _switched_off(scanned, table.allowed)
    every = count < _DENSE_SHARE * width
    group = group_size(count, width)
    coded = scanned.coded
    capacity = count if every else candidates.capacity_of(count, width, group, batch, coded)
    step = min(batch, max(1, _LIST_BYTES // (_PLACE_BYTES * capacity)))
    counts, best = [], []
    for start in range(0, batch, step):
        part = query if step == batch else query.part(start, min(batch, start + step))
        own = excluded if excluded is None or step == batch else excluded.part(start, start + step)
        if every:
            keys = rescore.every_key(part, table, own)
        else:
            found = group_best(scanned, part.operand, group, own, place)
            lists = candidates.reach(found, scanned, part, width, group, capacity)
            counts.append(lists.count)
            keys = rescore.listed_keys(part, table, lists, found, group, width, own)
        best.append(rescore.best_of(keys, k))
    scores, ids = best[0] if len(best) == 1 else map(torch.cat, zip(*best, strict=True))
    if every:
        return scores, ids, lambda: SearchStats("dense", batch, 0.0, 0, batch)
    return scores, ids, lambda: _stats(name, torch.cat(counts), width, group, capacity)


def _switched_off(scanned: Scanned, allowed: torch.Tensor) -> Scanned:
    """The scan in which the rows that are not allowed have no score."""
    if scanned.sub is not None:
        off = torch.where(allowed, scanned.sub, float("inf"))
        return replace(scanned, sub=off, some_off=True)
    sub = torch.full(allowed.shape, float("inf"), dtype=torch.float32, device=allowed.device)
    return replace(scanned, sub=sub.masked_fill_(allowed, 0.0), some_off=True)


def _stats(name: str, counts: torch.Tensor, k: int, group: int, capacity: int) -> SearchStats:
    """What the lists of a batch say. counts: int32 [B, 2], single rows and whole groups."""
    single, whole = counts.long().unbind(1)
    listed = single + whole * group
    kept = listed <= capacity
    num_dense = int((~kept).sum())
    ratio = int(listed[kept].sum()) / max(1, (len(counts) - num_dense) * k)
    name = name if num_dense < len(counts) else "dense"
    return SearchStats(name, len(counts), ratio, int(whole[kept].sum()), num_dense)


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
    excluded = exclusions(exclude, queries.shape[0], items.shape[0], items.device)
    included = normalize_include(include, items.shape[0], items.device)
    table, place = Table(items), None
    if included is not None and is_gathered(table, included):
        table, place = gather(table, included, None)
    elif included is not None:
        table = Table(items, allowed=as_mask(included, items.shape[0]))
    scanned, query = prepare_rows(table.rows, queries, similarity, temperature)
    table = replace(table, rows=scanned.codes)
    scores, ids, _ = search(scanned, query, table, k, excluded, "triton", place)
    return scores, ids


def aot_configs() -> list[dict]:
    """Every configuration that ships, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    from ...._scan import triton_exclusions, triton_queries
    from . import direction, factors, shipped

    return [
        *triton_exclusions.aot_configs(),
        *triton_queries.aot_configs(),
        *direction.aot_configs(),
        *factors.aot_configs(),
        *shipped.aot_configs(),
        *candidates.aot_configs(),
        *rescore.aot_configs(),
    ]

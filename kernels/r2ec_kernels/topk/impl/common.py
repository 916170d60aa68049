"""The certified search: a coarse scan in blocks, a running threshold, an exact re-score.

Wanted: the k rows of X [N, d] with the largest canonical scores of each query, lower ids first
among equal ones. A coarse scan gives raw scores g' with |g' - g| <= e. For every query a pool holds
the rows that may still be among the best k, with the bounds g' - e and g' + e. The threshold is the
k-th largest lower bound seen; a row whose upper bound is below it can neither win nor tie. What is
left at the end, a few rows a result, is re-scored exactly and sorted.

Queries for which this does not pay (mass ties, k near the number of rows, numbers that float32
cannot hold) take the dense path: canonical scores of every row, in blocks. Several scans may be
given, a narrow copy first: the next one is for queries that the one before left too many
candidates. Results do not depend on which path ran.

FLOPs: 2 B N d in the scan's type, 2 d in float64 for each candidate. Bytes: one read of what the
scan multiplies. Memory: O(B k + block).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..._cpu import extension
from ..._exact.bounds import Queries
from ..._exact.excluded import ExcludedPairs
from ..._exact.scores import PADDING_KEY, canonical_scores, from_order_keys, order_keys
from ..._exact.table import Table
from ..._scan.blocks import DENSE_SHARE, CoarseScan, visiting_order
from ..._scan.rescore import best_keys
from .pool import Pool, pool_limit

_DENSE_BLOCK = 4096  # rows of a dense block
_ELEMENTS = 1 << 22  # elements of a dense block
_INFINITE = 0x7F800000 << 32  # order keys of infinite scores: from here, and below its negative
_MAX_UNBOUNDED = 64  # rows outside float32's range beyond which every query is dense


@dataclass(frozen=True)
class SearchStats:
    """What the last search did.

    Attributes:
        scan: the product of the coarse scan, such as "float32", "bf16" or "int8 x bf16"; "dense"
            where none ran.
        queries: B.
        candidates_per_k: rows rescored canonically for a result slot (mean; 1 is the least).
        rescanned_groups: groups of rows looked into because their maximum met the threshold; where
            the compiled scans run, single rows that did.
        dense_rows: queries that took the dense path.
        scanned_again: queries that the first scan left too many candidates; the rows themselves
            were scanned for them.
    """

    scan: str
    queries: int
    candidates_per_k: float
    rescanned_groups: int
    dense_rows: int
    scanned_again: int = 0


def certified_topk(
    table: Table,
    scans: Sequence[Callable[[Queries], CoarseScan]],
    query: Queries,
    k: int,
    excluded: ExcludedPairs,
) -> tuple[torch.Tensor, torch.Tensor, SearchStats]:
    """The k best rows of ``table`` for each query, exactly.

    Args:
        scans: what makes the coarse scan of a batch; the next one is for queries that the one
            before left too many candidates; those of the last take the dense path.

    Returns scores float32 [B, k] and ids int64 [B, k], padded with (-inf, -1), and statistics.
    """
    batch, device = query.original.shape[0], query.original.device
    keys = torch.full((batch, k), PADDING_KEY, dtype=torch.int64, device=device)
    count = table.num_allowed
    width = min(k, count)
    if batch == 0 or width == 0:
        return *from_order_keys(keys), SearchStats("dense", batch, 0.0, 0, 0)
    left_rows = count if excluded.empty else count - excluded.counts
    todo = ~(query.dense | (left_rows < DENSE_SHARE * width))
    candidates, looked_into, name, left = 0, 0, "dense", []
    for make in scans:
        if not bool(todo.any()):
            break
        part, own = query, excluded
        chosen: torch.Tensor | slice = slice(None)
        if not bool(todo.all()):
            kept = todo.clone()
            part, own, chosen = query[kept], excluded.pick(kept), kept
        scan = make(part)
        found, failed, rescored, met = _scan(table, scan, part, width, own)
        candidates, looked_into = candidates + rescored, looked_into + met
        if name == "dense" and not bool(failed.all()):
            name = scan.name
        keys[chosen, :width] = found
        todo[chosen] = failed
        left.append(int(failed.sum()))
    dense = (keys[:, 0] == PADDING_KEY) | todo
    num_dense = int(dense.sum())
    if num_dense:
        keys[dense, :width] = dense_topk(table, query[dense], width, excluded.pick(dense))
    ratio = candidates / max(1, (batch - num_dense) * width)
    again = left[0] if len(left) > 1 else 0
    return *from_order_keys(keys), SearchStats(name, batch, ratio, looked_into, num_dense, again)


class _Collected(NamedTuple):
    """Rows that may be among the k best: int64 [B, C], -1 for none; the queries that were given up,
    bool [B]; how many groups or rows met a threshold."""

    rows: torch.Tensor
    failed: torch.Tensor
    met: int


def _scan(
    table: Table, scan: CoarseScan, query: Queries, k: int, excluded: ExcludedPairs
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Keys [B, k], queries that need the dense path [B], candidates, groups that met the cut."""
    batch, device = query.original.shape[0], query.original.device
    height = -(-max(scan.height, 2 * k) // scan.height) * scan.height
    blocks = visiting_order(table.rows.shape[0], height)
    if extension.available(device):
        collector = extension.Collector(batch, k, pool_limit(k), excluded.keys())
        unbounded = scan.feed(collector, blocks, table.allowed)
        if unbounded is not None:
            unbounded = table.allowed_among(unbounded)
        found = _Collected(*collector.finish())
    else:
        found, unbounded = _collect(table, scan, blocks, k, excluded)
    rows, failed, met = found
    if unbounded is not None and unbounded.numel():
        if unbounded.numel() > _MAX_UNBOUNDED:
            everyone = torch.ones(batch, dtype=torch.bool, device=device)
            nothing = torch.full((batch, k), PADDING_KEY, dtype=torch.int64, device=device)
            return nothing, everyone, 0, met
        extra = unbounded.expand(batch, -1)
        of = torch.arange(batch, device=device)[:, None].expand_as(extra)
        rows = torch.cat([rows, extra.masked_fill(excluded.holds(of, extra), -1)], 1)
    keys = best_keys(table, query, rows, k)
    # An infinite score means that the canonical score overflowed: ties the bounds do not see.
    failed = failed | (keys[:, 0] >= _INFINITE) | (keys[:, -1] < -_INFINITE)
    return keys, failed, int((rows >= 0).sum()), met


def _collect(
    table: Table,
    scan: CoarseScan,
    blocks: list[tuple[int, int]],
    k: int,
    excluded: ExcludedPairs,
) -> tuple[_Collected, torch.Tensor | None]:
    """The candidates of all blocks and the unbounded rows, by torch operations on any device."""
    pool = Pool(excluded.batch, k, excluded.rows.device)
    unbounded: list[torch.Tensor] = []
    for done, (start, stop) in enumerate(blocks):
        if done > 1 and done & (done - 1) == 0:  # after 2, 4, 8 ... blocks: twice as many rows
            pool.compact()
        scores, error, beyond = scan.score(start, stop)
        table.mask(start, stop, scores, float("-inf"))
        excluded.mask(start, stop, scores, float("-inf"))
        if beyond is not None:
            unbounded.append(table.allowed_among(beyond))
            if sum(rows.numel() for rows in unbounded) > _MAX_UNBOUNDED:
                break
        pool.add_block(scores, error, start)
    pool.compact()
    rows = pool.rows[:, : max(1, int(pool.fill.max()))]
    empty = torch.arange(rows.shape[1], device=rows.device) >= pool.fill[:, None]
    found = _Collected(rows.masked_fill(empty, -1), pool.failed, pool.met)
    return found, torch.cat(unbounded) if unbounded else None


def dense_topk(table: Table, query: Queries, k: int, excluded: ExcludedPairs) -> torch.Tensor:
    """Order keys [B, k] from canonical scores of every row, merged block by block."""
    batch, device = query.original.shape[0], query.original.device
    keys = torch.full((batch, k), PADDING_KEY, dtype=torch.int64, device=device)
    height = max(_DENSE_BLOCK, k)
    step = max(1, _ELEMENTS // height)
    for first in range(0, batch, step):
        part = slice(first, min(batch, first + step))
        chosen = torch.zeros(batch, dtype=torch.bool, device=device)
        chosen[part] = True
        own = excluded.pick(chosen)
        for start in range(0, table.rows.shape[0], height):
            stop = min(start + height, table.rows.shape[0])
            scores = canonical_scores(
                query.original[part], table.rows[start:stop], query.similarity, query.temperature
            )
            at = torch.arange(start, stop, device=device)
            block = order_keys(scores, table.ids_of(at))
            table.mask(start, stop, block.T, PADDING_KEY)
            own.mask(start, stop, block.T, PADDING_KEY)
            keys[part] = torch.cat([keys[part], block], 1).topk(k, dim=1).values
    return keys

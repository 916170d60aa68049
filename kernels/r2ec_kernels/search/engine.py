"""The certified search: a float first pass in blocks, a running threshold, exact rescoring.

For every query a pool holds the rows that may still be among the best k, with bounds of their raw
scores. The threshold is the k-th largest lower bound seen; a row whose upper bound is below it can
neither win nor tie. Queries for which this does not pay (mass ties, k near the number of rows,
numbers that float32 cannot hold) take the dense path: canonical scores of every row, in blocks.
Memory is O(B k + block) either way, and results do not depend on which path ran.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .. import compiled
from ..canonical import PADDING_KEY, canonical_scores, from_order_keys, order_keys, pair_scores
from ..exclude import exclude_rows
from .bounds import Queries

GROUP = 32  # rows whose maximum meets the threshold first
_DENSE_SHARE = 8  # k above (rows - excluded) / 8 takes the dense path
_DENSE_BLOCK = 4096  # rows of a dense block
_ELEMENTS = 1 << 22  # elements of a dense block
_INFINITE = 0x7F800000 << 32  # order keys of infinite scores: from here, and below its negative
_MAX_UNTRUSTED = 64  # rows outside float32's range beyond which every query is dense


class Scores(NamedTuple):
    """Raw scores of a block of rows.

    Attributes:
        values: float32 [n, B], n the rows rounded up to a multiple of GROUP, in any memory order;
            the entries beyond the rows, and those of doubtful rows, are -inf. Valid until the next
            block.
        error: float32 [B], bound of their errors.
        doubtful: int64 [M] rows whose scores it does not bound, or None: rescored in any case.
    """

    values: torch.Tensor
    error: torch.Tensor
    doubtful: torch.Tensor | None


class Buffer:
    """Memory for the scores of one block after another, of any width and type."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def take(self, rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[rows, width], overwritten by the next call for this width and type."""
        key = width, dtype
        if key not in self._memory or rows > self._memory[key].shape[0]:
            self._memory[key] = torch.empty(rows, width, dtype=dtype, device=self._device)
        return self._memory[key][:rows]


class FirstPass(Protocol):
    """Raw scores of one batch, block by block."""

    name: str  # of its product, for statistics
    height: int  # rows of a block; blocks are multiples of it
    offset: torch.Tensor  # float64 [B], what its raw scores of a query all lack (not for l2)

    def score(self, start: int, stop: int) -> Scores:
        """Raw scores of rows start..stop-1, ``start`` a multiple of ``height``."""
        ...

    def feed(
        self, collector: compiled.Collector, blocks: list[tuple[int, int]]
    ) -> torch.Tensor | None:
        """Offer the scores of all blocks (start, stop), in this order or another.

        Returns the doubtful rows int64 [M] of all blocks, or None. On CPUs only.
        """
        ...


class Table(Protocol):
    """What a search needs of a table. Rows are positions; ids are what users see."""

    rows: torch.Tensor  # [num_rows, d], the stored values
    ids: torch.Tensor | None  # int64 [num_rows]: the id of each row; None: its position


def whole_groups(rows: int) -> int:
    """``rows`` rounded up to a multiple of GROUP."""
    return -(-rows // GROUP) * GROUP


def group_best(scores: torch.Tensor) -> torch.Tensor:
    """The largest of each group of a block's scores [n, B], [n / GROUP, B].

    Rows of a group lie n / GROUP apart: in either memory order the maximum is vectorised.
    """
    if scores.is_contiguous():
        return scores.unflatten(0, (GROUP, -1)).amax(0)
    # [B, n] in memory; a reduction is fast only into its input's order
    return scores.T.unflatten(1, (GROUP, -1)).amax(1).T


def entries_from(
    scores: torch.Tensor, of: torch.Tensor, group: torch.Tensor, cut: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scores >= ``cut`` [B] in the groups int64 [M] of the queries ``of`` int64 [M].

    Returns (query, row of the block, score), ordered as ``of`` is.
    """
    grouped = scores.unflatten(0, (GROUP, -1))
    values = grouped[:, group, of].T  # [M, GROUP]
    hit, slot = (values >= cut[of, None]).nonzero(as_tuple=True)
    return of[hit], slot * grouped.shape[1] + group[hit], values[hit, slot]


@dataclass(frozen=True)
class SearchStats:
    """What the last search did.

    Attributes:
        scan: the product of the first pass, such as "float32", "bf16" or "int8 x bf16"; "dense"
            where none ran.
        queries: B.
        candidates_per_k: rows rescored canonically for a result slot (mean; 1 is the least).
        rescanned_groups: groups of rows opened because their maximum met the threshold; where the
            compiled passes run, single rows that did.
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


class Excluded:
    """(query, row) pairs that must not be returned, ordered by row."""

    def __init__(self, rows: torch.Tensor, offsets: torch.Tensor) -> None:
        """rows: int64 [E], row positions, -1 for none; offsets: int64 [B+1]."""
        self.rows = self.of = rows
        self.counts = offsets.diff()
        self.empty = rows.numel() == 0
        if not self.empty:
            order = torch.argsort(rows)
            self.rows, self.of = rows[order], exclude_rows(offsets, rows.numel())[order]

    def mask(self, start: int, stop: int, scores: torch.Tensor, value: float | int) -> None:
        """Set the entries of excluded pairs in ``scores`` [stop - start, B] to ``value``."""
        if self.empty:
            return
        edges = torch.tensor([start, stop], device=self.rows.device)
        low, high = torch.searchsorted(self.rows, edges).tolist()
        if high > low:
            scores[self.rows[low:high] - start, self.of[low:high]] = value

    def pick(self, chosen: torch.Tensor) -> "Excluded":
        """The pairs of the queries in ``chosen`` (bool [B]), renumbered."""
        picked = object.__new__(Excluded)
        number = torch.cumsum(chosen, 0) - 1
        kept = chosen[self.of]
        picked.rows, picked.of = self.rows[kept], number[self.of[kept]]
        picked.counts = self.counts[chosen]
        picked.empty = picked.rows.numel() == 0
        return picked

    def pairs(self) -> torch.Tensor:
        """int64 [E]: row * B + query of each pair."""
        return self.rows * self.counts.numel() + self.of

    def holds(self, of: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """bool, the shape of ``of``: whether (of, row) is an excluded pair."""
        return torch.isin(rows * self.counts.numel() + of, self.pairs())


def _pool_limit(k: int) -> int:
    """Candidates of a query beyond which it is given up to the dense path."""
    return 8 * k + 512


class _Pool:
    """Rows that may still be among the best k of each query."""

    def __init__(self, batch: int, k: int, device: torch.device) -> None:
        self.k, self.capacity = k, _pool_limit(k)
        shape = (batch, self.capacity)
        self.lower = torch.full(shape, float("-inf"), device=device)
        self.upper = torch.full(shape, float("-inf"), device=device)
        self.rows = torch.zeros(shape, dtype=torch.int64, device=device)
        self.fill = torch.zeros(batch, dtype=torch.int64, device=device)
        self.threshold = torch.full((batch,), float("-inf"), device=device)
        self.failed = torch.zeros(batch, dtype=torch.bool, device=device)
        self.fresh = True  # some threshold may still be -inf
        self.opened = 0

    def raise_threshold(self, scores: torch.Tensor, error: torch.Tensor, of: torch.Tensor) -> None:
        """Use the k-th best score of a block [n, B] for the queries ``of``, if it has k rows."""
        if scores.shape[0] >= self.k and of.numel():
            best = scores[:, of].T.contiguous().topk(self.k, dim=1, sorted=False).values.amin(1)
            self.threshold[of] = torch.maximum(self.threshold[of], best - error[of])

    def add_block(self, scores: torch.Tensor, error: torch.Tensor, start: int) -> None:
        """Take the rows of a block [n, B] (n a multiple of GROUP) that meet the threshold."""
        best = group_best(scores)
        if self.fresh:
            fresh = torch.isinf(self.threshold) & ~self.failed
            self.fresh = bool(fresh.any())
            # maxima of groups are scores too, and few; the k best of a block rarely share a group
            few = best if best.shape[0] >= self.k else scores
            self.raise_threshold(few, error, fresh.nonzero()[:, 0])
        # Above -inf, so that masked rows never pass.
        cut = (self.threshold - error).clamp_min(torch.finfo(torch.float32).min)
        opened = (best >= cut).T.nonzero(as_tuple=True)
        if not opened[0].numel():
            return
        self.opened += opened[0].numel()
        of, row, score = entries_from(scores, *opened, cut)
        row += start
        of, score, row = self._make_room(of, score, row, scores, error)
        if of.numel():
            counts = torch.bincount(of, minlength=self.fill.numel())
            first = torch.cumsum(counts, 0) - counts
            place = self.fill[of] + torch.arange(of.numel(), device=of.device) - first[of]
            self.lower[of, place] = score - error[of]
            self.upper[of, place] = score + error[of]
            self.rows[of, place] = row
            self.fill += counts

    def _make_room(
        self,
        of: torch.Tensor,
        score: torch.Tensor,
        row: torch.Tensor,
        scores: torch.Tensor,
        error: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Raise thresholds until the new rows fit; give up on queries where that fails."""

        def overfull() -> torch.Tensor:
            counts = torch.bincount(of, minlength=self.fill.numel())
            return (self.fill + counts > self.capacity).nonzero()[:, 0]

        def refilter() -> None:
            nonlocal of, score, row
            kept = score >= (self.threshold - error)[of]
            of, score, row = of[kept], score[kept], row[kept]

        if overfull().numel():
            self.compact()
            refilter()
        if (full := overfull()).numel():
            self.raise_threshold(scores, error, full)
            self.compact()
            refilter()
        if (full := overfull()).numel():
            self.failed[full] = True
            self.threshold[full] = float("inf")
            self.fill[full] = 0
            refilter()
        return of, score, row

    def compact(self) -> None:
        """Raise thresholds by the pool itself and drop the rows below them."""
        empty = torch.arange(self.capacity, device=self.fill.device) >= self.fill[:, None]
        self.lower.masked_fill_(empty, float("-inf"))
        self.upper.masked_fill_(empty, float("-inf"))
        best = self.lower.topk(self.k, dim=1, sorted=False).values.amin(1)
        self.threshold = torch.maximum(self.threshold, best)
        kept = self.upper >= self.threshold[:, None]
        kept &= ~empty
        of, place = kept.nonzero(as_tuple=True)
        self.fill = kept.sum(1)
        first = torch.cumsum(self.fill, 0) - self.fill
        to = torch.arange(of.numel(), device=of.device) - first[of]
        for field in (self.lower, self.upper, self.rows):
            field[of, to] = field[of, place]


def certified_topk(
    table: Table,
    passes: Sequence[Callable[[Queries], FirstPass]],
    query: Queries,
    k: int,
    excluded: Excluded,
) -> tuple[torch.Tensor, torch.Tensor, SearchStats]:
    """The k best rows of ``table`` for each query, exactly.

    Args:
        passes: first passes, the next one for queries that the one before left too many candidates;
            those of the last take the dense path.

    Returns scores float32 [B, k] and ids int64 [B, k], padded with (-inf, -1), and statistics.
    """
    batch, device = query.original.shape[0], query.original.device
    keys = torch.full((batch, k), PADDING_KEY, dtype=torch.int64, device=device)
    width = min(k, table.rows.shape[0])
    if batch == 0 or width == 0:
        return *from_order_keys(keys), SearchStats("dense", batch, 0.0, 0, 0)
    todo = ~(query.dense | (table.rows.shape[0] - excluded.counts < _DENSE_SHARE * width))
    candidates, opened, name, left = 0, 0, "dense", []
    for first_pass in passes:
        if not bool(todo.any()):
            break
        part, own, chosen = query, excluded, slice(None)
        if not bool(todo.all()):
            chosen = todo.clone()
            part, own = query[chosen], excluded.pick(chosen)
        scan = first_pass(part)
        found, failed, rescored, met = _scan(table, scan, part, width, own)
        candidates, opened = candidates + rescored, opened + met
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
    return *from_order_keys(keys), SearchStats(name, batch, ratio, opened, num_dense, again)


class _Collected(NamedTuple):
    """Rows that may be among the k best: int64 [B, C], -1 for none; the queries that were given up,
    bool [B]; how many groups or rows met a threshold."""

    rows: torch.Tensor
    failed: torch.Tensor
    opened: int


def _scan(
    table: Table, scan: FirstPass, query: Queries, k: int, excluded: Excluded
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Keys [B, k], queries that need the dense path [B], candidates, opened groups."""
    batch, device = query.original.shape[0], query.original.device
    height = -(-max(scan.height, 2 * k) // scan.height) * scan.height
    blocks = visiting_order(table.rows.shape[0], height)
    if compiled.available(device):
        collector = compiled.Collector(batch, k, _pool_limit(k), excluded.pairs())
        doubtful = scan.feed(collector, blocks)
        found = _Collected(*collector.finish())
    else:
        found, doubtful = _collect(scan, blocks, batch, k, excluded)
    rows, failed, opened = found
    if doubtful is not None:
        if doubtful.numel() > _MAX_UNTRUSTED:
            everyone = torch.ones(batch, dtype=torch.bool, device=device)
            nothing = torch.full((batch, k), PADDING_KEY, dtype=torch.int64, device=device)
            return nothing, everyone, 0, opened
        extra = doubtful.expand(batch, -1)
        of = torch.arange(batch, device=device)[:, None].expand_as(extra)
        rows = torch.cat([rows, extra.masked_fill(excluded.holds(of, extra), -1)], 1)
    keys = _rescore(table, query, rows, k)
    # An infinite score means that the canonical score overflowed: ties the bounds do not see.
    failed = failed | (keys[:, 0] >= _INFINITE) | (keys[:, -1] < -_INFINITE)
    return keys, failed, int((rows >= 0).sum()), opened


def _collect(
    scan: FirstPass, blocks: list[tuple[int, int]], batch: int, k: int, excluded: Excluded
) -> tuple[_Collected, torch.Tensor | None]:
    """The candidates of all blocks and the doubtful rows, by torch operations on any device."""
    pool = _Pool(batch, k, excluded.counts.device)
    untrusted: list[torch.Tensor] = []
    for done, (start, stop) in enumerate(blocks):
        if done > 1 and done & (done - 1) == 0:  # after 2, 4, 8 ... blocks: twice as many rows
            pool.compact()
        scores, error, doubtful = scan.score(start, stop)
        excluded.mask(start, stop, scores, float("-inf"))
        if doubtful is not None:
            untrusted.append(doubtful)
            if sum(rows.numel() for rows in untrusted) > _MAX_UNTRUSTED:
                break
        pool.add_block(scores, error, start)
    pool.compact()
    rows = pool.rows[:, : max(1, int(pool.fill.max()))]
    empty = torch.arange(rows.shape[1], device=rows.device) >= pool.fill[:, None]
    found = _Collected(rows.masked_fill(empty, -1), pool.failed, pool.opened)
    return found, torch.cat(untrusted) if untrusted else None


def visiting_order(num_rows: int, height: int) -> list[tuple[int, int]]:
    """(start, stop) of all blocks, spread over the table by the golden ratio, so that a table
    sorted by score does not raise the threshold at every block."""
    count = -(-num_rows // height)
    order = sorted(range(count), key=lambda block: (block * 0.6180339887498949) % 1.0)
    return [(block * height, min((block + 1) * height, num_rows)) for block in order]


def _rescore(table: Table, query: Queries, rows: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest order keys [B, k] of candidate rows [B, C] (-1: none) by canonical score."""
    if compiled.reads(table.rows):
        return compiled.best_keys(query, table.rows, table.ids, rows, k)
    of, place = (rows >= 0).nonzero(as_tuple=True)
    at = rows[of, place]
    scores = pair_scores(query.original, table.rows, of, at, query.similarity, query.temperature)
    keys = torch.full((len(rows), max(k, rows.shape[1])), PADDING_KEY, device=rows.device)
    keys[of, place] = order_keys(scores, at if table.ids is None else table.ids[at])
    return keys.topk(k, dim=1).values


def dense_topk(table: Table, query: Queries, k: int, excluded: Excluded) -> torch.Tensor:
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
            if table.ids is None:
                ids = torch.arange(start, stop, device=device)
            else:
                ids = table.ids[start:stop]
            block = order_keys(scores, ids)
            own.mask(start, stop, block.T, PADDING_KEY)
            keys[part] = torch.cat([keys[part], block], 1).topk(k, dim=1).values
    return keys

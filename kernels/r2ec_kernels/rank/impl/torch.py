"""target_stats in plain torch: one coarse scan of the items in blocks, any device.

For each query with target t, canonical scores s and the competing rows n:

    rank = 1 + sum_n [s_n > s_t, or s_n = s_t and id_n < id_t]
    log_prob = -ln 2 (m + log2 l),  m = max_n x,  l = sum_n 2^(x - m),  x = log2(e) (s_n - s_t)

A coarse scan gives raw scores within a proven error e of the exact ones. A row above origin + e is
ahead, one below origin - e is not, and the near-ties between are re-scored exactly, so that ranks
are exact. The log-sum-exp is an online softmax over the scan's scores relative to the target's,
whose own term it starts with. Where near-ties are too many, the next scan is tried; where no scan
can bound a row, canonical scores of all rows decide (``common.dense_stats``).

Blocks: [n, B] scores (``_scan.blocks``); one read of the table, 2 N B d FLOPs, and five reads of
each score. Numerics: scores and m float32, l float64. On CPUs the compiled scan does all of it
while it makes the scores (``FusedScan``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from ..._cpu import extension
from ..._exact.bounds import Queries, prepare_queries
from ..._exact.excluded import ExcludedPairs
from ..._exact.included import as_mask, restrict, switched_off
from ..._exact.table import Table
from ..._numbers import UNIT
from ..._scan.blocks import CoarseScan, entries_from, group_best
from ..._scan.float32 import Float32Scan
from . import common
from .common import Origin, Targets, count_ahead, dense_stats

# Share of near-ties from which re-scoring them costs more than a narrower bound, for many queries
# and for one.
NEAR_SHARE, NEAR_SHARE_ONE = 0.003, 0.05
FEW_GROUPS = 8  # where an eighth of the groups reach the target, all scores are compared with it
_MOST_NEAR = 1 << 22  # near-ties that the compiled scan may leave
SPLIT_BATCH = 32  # queries from which products are split in two: half the error bound, 3% time


def target_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    exclude_values: torch.Tensor,
    exclude_offsets: torch.Tensor,
    include: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) over a plain table.

    target_rows: [B, d], the targets' rows where some are foreign (``common.Targets``).
    """
    query = prepare_queries(queries, similarity, temperature)
    excluded = ExcludedPairs.from_offsets(exclude_values, exclude_offsets)
    table = Table(items)
    if target_rows is None:
        table, excluded, targets = restrict(table, include, excluded, targets)
    elif include is not None:  # rows that are gathered lose the places of foreign targets
        table, excluded = switched_off(table, as_mask(include, len(table)), excluded)
    scans = row_scans(table.rows, None, queries.shape[0])
    return certified_stats(table, scans, query, targets, excluded, target_rows)


@runtime_checkable
class FusedScan(Protocol):
    """A scan that ranks and sums while it makes the scores. ``offset``: what the raw scores leave
    out, float64 [B] or 0."""

    @property
    def offset(self) -> torch.Tensor | float: ...

    def stats(self, targets: extension.RankTargets, most_near: int) -> extension.Stats: ...


@dataclass(frozen=True)
class FusedRows:
    """The compiled scan of the rows themselves."""

    rows: torch.Tensor
    query: Queries
    offset: float = 0.0

    def stats(self, targets: extension.RankTargets, most_near: int) -> extension.Stats:
        return extension.stats(self.rows, self.query, targets, most_near)


RankScan = Callable[[Queries], CoarseScan | FusedScan]


def row_scans(rows: torch.Tensor, norms: torch.Tensor | None, batch: int) -> list[RankScan]:
    """The scans of rows [N, d] themselves; norms: [N], or None: not known."""
    fused: list[RankScan] = [partial(FusedRows, rows)] if extension.fits(rows, batch) else []
    return [*fused, partial(_float32_scan, rows, norms)]


def _float32_scan(rows: torch.Tensor, norms: torch.Tensor | None, query: Queries) -> Float32Scan:
    """The rows' own products, in two parts for many queries: near-ties cost more there than the
    second part."""
    parts = 2 if query.scaled.shape[0] >= SPLIT_BATCH and rows.shape[1] > 1 else 1
    return Float32Scan(rows, norms, query, parts)


def certified_stats(
    table: Table,
    scans: Sequence[RankScan],
    query: Queries,
    targets: torch.Tensor,
    excluded: ExcludedPairs,
    target_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) of targets among the rows of a table.

    Args:
        table: the rows, which of them compete, and the ids by which equal scores are ordered.
        scans: what makes the coarse scan of a batch; the next one is tried where the one before
            leaves too many near-ties; where the last cannot bound a row's score, canonical scores
            of all rows.
        query: the prepared batch.
        targets: int64 [B], row positions; a target competes even where it is excluded, or the
            table does not allow it.
        excluded: pairs of queries and row positions that do not compete.
        target_rows: [B, d], the targets' rows where some are foreign (``common.Targets``); None:
            the table's.
    """
    batch, device = query.original.shape[0], query.original.device
    excluded = excluded.without(targets)
    rank = torch.ones(batch, dtype=torch.int64, device=device)
    log_prob = torch.zeros(batch, device=device)
    if batch == 0:
        return rank, log_prob
    wanted = Targets.of(table, query, targets, target_rows)
    # A distance from a float32 square loses its digits where the query is near the item.
    dense = query.dense | ~torch.isfinite(wanted.score) | (query.similarity == "l2")
    scanned = ~dense
    if bool(scanned.any()):
        found = _scanned_stats(
            table, scans, query[scanned], wanted.pick(scanned), excluded.pick(scanned)
        )
        if found is not None:
            rank[scanned], log_prob[scanned] = found
            dense[scanned] = common.overflows(wanted.score[scanned], found[1])
        else:
            dense[:] = True
    if bool(dense.any()):
        rank[dense], log_prob[dense] = dense_stats(
            table, query[dense], wanted.pick(dense), excluded.pick(dense)
        )
    return rank, log_prob


def _scanned_stats(
    table: Table,
    scans: Sequence[RankScan],
    query: Queries,
    targets: Targets,
    excluded: ExcludedPairs,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ranks and log-probabilities by the first scan that leaves few near-ties; None where none can
    be exact."""
    for position, make in enumerate(scans, start=1):
        scan = make(query)
        if isinstance(scan, FusedScan):
            if table.allowed is not None:  # it takes all rows
                continue
            found = _fused_stats(table, scan, query, targets, excluded)
        else:
            patient = position == len(scans)
            found = _RankScan(table, scan, query, targets, patient).run(excluded)
        if found is not None:
            return found
    return None


def _fused_stats(
    table: Table,
    fused: FusedScan,
    query: Queries,
    targets: Targets,
    excluded: ExcludedPairs,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ranks and log-probabilities; None where some row's score cannot be bounded, or
    near-ties are too many."""
    batch = len(targets.at)
    origin = Origin.of(query, targets.rows, fused.offset)
    compared = extension.RankTargets(
        raw=origin.raw,
        rounded=origin.rounded,
        logit=origin.logit,
        l=origin.moved.exp2(),
        excluded=targets.added_to(excluded).keys(),
    )
    found = fused.stats(compared, _MOST_NEAR)
    if not found.complete:
        return None
    rank = 1 + found.ahead
    of, at = found.near_ties % batch, found.near_ties // batch
    rank += count_ahead(table, query, targets, of, at)
    return rank, origin.log_prob(found.m, found.l)


class _RankScan:
    """The running ranks and log-sum-exps of a batch. Scores are [rows of the block, B]."""

    def __init__(
        self,
        table: Table,
        scan: CoarseScan,
        query: Queries,
        targets: Targets,
        patient: bool,
    ) -> None:
        """patient: go on however many near-ties there are."""
        self.table, self.scan, self.query = table, scan, query
        self.targets = targets
        self.origin = Origin.of(query, targets.rows, scan.offset)
        self.m = torch.zeros_like(targets.score)
        self.l = self.origin.moved.exp2()
        self.rank = torch.ones_like(targets.at)
        self.above: torch.Tensor | None = None  # memory in the order of the scores
        self.reach: torch.Tensor | None = None
        self.near_ties: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_near_ties = 0
        share = 1.0 if patient else max(NEAR_SHARE, NEAR_SHARE_ONE / len(targets.at))
        self.most_near_ties = share * len(targets.at)  # of a row

    def run(self, excluded: ExcludedPairs) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scan all rows but the targets. Returns ranks and log-probabilities; None where some row's
        score cannot be bounded, or near-ties are too many."""
        excluded = self.targets.added_to(excluded)
        height = self.scan.height
        for start in range(0, self.table.rows.shape[0], height):
            stop = min(start + height, self.table.rows.shape[0])
            scores, error, unbounded = self.scan.score(start, stop)
            if unbounded is not None:
                return None
            self.table.mask(start, stop, scores, -torch.inf)
            excluded.mask(start, stop, scores, -torch.inf)
            best = group_best(scores)
            if self._count(scores, best, error, start) > self.most_near_ties * (stop - start):
                return None
            self._add(scores, best)
        self._rescore()
        return self.rank, self.origin.log_prob(self.m, self.l)

    def _count(
        self, scores: torch.Tensor, best: torch.Tensor, error: torch.Tensor, start: int
    ) -> int:
        """Count what is ahead for certain; returns how many pairs are not."""
        # both canonical roundings and that of the two limits
        error = error.double() + self.origin.raw.abs() * 4 * UNIT
        high, low = (self.origin.raw + error).float(), (self.origin.raw - error).float()
        met = best >= low
        if int(met.sum()) * FEW_GROUPS < met.numel():
            of, group = met.T.nonzero(as_tuple=True)
            of, row, score = entries_from(scores, of, group, low)
            sure = score > high[of]
            self.rank += torch.bincount(of[sure], minlength=self.rank.numel())
            of, row = of[~sure], row[~sure]
        else:
            if self.above is None or self.reach is None or self.above.shape != scores.shape:
                self.above, self.reach = torch.empty_like(scores), torch.empty_like(scores)
            above = torch.gt(scores, high, out=self.above)
            self.rank += _sum_rows(above).long()
            near_ties = torch.ge(scores, low, out=self.reach).sub_(above)
            some = near_ties.amax(1).nonzero()[:, 0]
            row, of = near_ties[some].nonzero(as_tuple=True)
            row = some[row]
        if of.numel():
            self.near_ties.append((of, row + start))
            self.num_near_ties += of.numel()
            if self.num_near_ties * self.table.rows.shape[1] > common.PAIR_ELEMENTS:
                self._rescore()
        return of.numel()

    def _rescore(self) -> None:
        """Compare the near-ties' canonical scores with the target's."""
        if not self.near_ties:
            return
        of, at = (torch.cat(parts) for parts in zip(*self.near_ties, strict=True))
        self.near_ties, self.num_near_ties = [], 0
        self.rank += count_ahead(self.table, self.query, self.targets, of, at)

    def _add(self, scores: torch.Tensor, best: torch.Tensor) -> None:
        """Update the online softmax by a block; overwrites the scores."""
        scores.sub_(self.origin.rounded)
        best = best.amax(0) - self.origin.rounded
        m = torch.maximum(self.m, best * self.origin.logit)
        self.l *= (self.m - m).double().exp2()
        e = torch.addcmul(-m, scores, self.origin.logit, out=scores).exp2_()
        self.l += _sum_rows(e)
        self.m = m


def _widened(scores: torch.Tensor) -> torch.Tensor:
    """Scores [n, B] in rows of the width that reductions want, [n / f, f B]; the entry of a column
    belongs to query ``column % B``."""
    rows, batch = scores.shape
    wide = 1
    while wide * batch < 128 and rows % (2 * wide) == 0:
        wide *= 2
    return scores.view(rows // wide, wide * batch)


def _sum_rows(scores: torch.Tensor) -> torch.Tensor:
    """Sum [n, B] over n; exact for fewer than 2^24 ones."""
    if not scores.is_contiguous():  # [B, n] in memory
        return scores.T.sum(1)
    return _widened(scores).sum(0).view(-1, scores.shape[1]).sum(0)

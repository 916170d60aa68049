"""target_stats in plain torch: one scan of the items in blocks, any device.

``certified_stats`` counts the items ahead of the target by a coarse scan with its error bound and
compares what lies within the bound by canonical scores, so that ranks are exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from ..._cpu import extension
from ..._exact.bounds import Queries, prepare_queries
from ..._exact.excluded import ExcludedPairs
from ..._exact.scores import canonical_scores
from ..._exact.table import Table
from ..._numbers import UNIT
from ..._scan.blocks import CoarseScan, entries_from, group_best
from ..._scan.float32 import Float32Scan
from . import common
from .common import Origin, count_ahead, dense_stats

# Share of the scores within the error bound of the target from which settling them costs more than
# a narrower bound, for many queries and for one.
NEAR_SHARE, NEAR_SHARE_ONE = 0.003, 0.05
FEW_GROUPS = 8  # where an eighth of the groups reach the target, all scores are compared with it
_MOST_NEAR = 1 << 22  # pairs that the compiled pass may leave to be settled
SPLIT_BATCH = 32  # queries from which products are split in two: half the error bound, 3% time


def target_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    exclude_values: torch.Tensor,
    exclude_offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) over a plain table."""
    query = prepare_queries(queries, similarity, temperature)
    excluded = ExcludedPairs.from_offsets(exclude_values, exclude_offsets)
    scans = row_scans(items, None, queries.shape[0])
    return certified_stats(Table(items), scans, query, targets, excluded)


class FusedScan(Protocol):
    """A pass that ranks and sums while it makes the scores. ``offset``: what the raw scores leave
    out, float64 [B] or 0."""

    @property
    def offset(self) -> torch.Tensor | float: ...

    def stats(self, contest: extension.Contest, most_near: int) -> extension.Stats: ...


@dataclass(frozen=True)
class FusedRows:
    """The compiled pass over the rows themselves."""

    rows: torch.Tensor
    query: Queries
    offset: float = 0.0

    def stats(self, contest: extension.Contest, most_near: int) -> extension.Stats:
        return extension.stats(self.rows, self.query, contest, most_near)


RankScan = Callable[[Queries], CoarseScan | FusedScan]


def row_scans(rows: torch.Tensor, norms: torch.Tensor | None, batch: int) -> list[RankScan]:
    """The passes over rows [N, d] themselves; norms: [N], or None: not known."""
    fused: list[RankScan] = [partial(FusedRows, rows)] if extension.fits(rows, batch) else []
    return [*fused, partial(_float32_scan, rows, norms)]


def _float32_scan(rows: torch.Tensor, norms: torch.Tensor | None, query: Queries) -> Float32Scan:
    """The rows' own products, in two parts for many queries: what lies within the error bound of a
    target costs more there than the second part."""
    parts = 2 if query.scaled.shape[0] >= SPLIT_BATCH and rows.shape[1] > 1 else 1
    return Float32Scan(rows, norms, query, parts)


def certified_stats(
    table: Table,
    passes: Sequence[RankScan],
    query: Queries,
    targets: torch.Tensor,
    excluded: ExcludedPairs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) of targets among the rows of a table.

    Args:
        table: the rows, and the ids by which equal scores are ordered.
        passes: first passes, the next one for when too much lies within the bound of the one
            before; where the last cannot bound a row's score, canonical scores of all rows.
        query: the prepared batch.
        targets: int64 [B], row positions; a target competes even where it is excluded.
        excluded: pairs of queries and row positions that do not compete.
    """
    batch, device = query.original.shape[0], query.original.device
    excluded = excluded.without(targets)
    rank = torch.ones(batch, dtype=torch.int64, device=device)
    log_prob = torch.zeros(batch, device=device)
    if batch == 0:
        return rank, log_prob
    own = table.rows[targets][:, None]
    target = canonical_scores(query.original, own, query.similarity, query.temperature)[:, 0]
    # A distance from a float32 square loses its digits where the query is near the item.
    dense = query.dense | ~torch.isfinite(target) | (query.similarity == "l2")
    scanned = ~dense
    if bool(scanned.any()):
        part, own = query[scanned], (target[scanned], targets[scanned])
        for position, make in enumerate(passes, start=1):
            first_pass = make(part)
            if hasattr(first_pass, "stats"):
                found = _fused_stats(table, first_pass, part, *own, excluded.pick(scanned))
            else:
                scan = _Scan(table, first_pass, part, *own, patient=position == len(passes))
                found = scan.run(excluded.pick(scanned))
            if found is not None:
                break
        if found is not None:
            rank[scanned], log_prob[scanned] = found
        else:
            dense[:] = True
    if bool(dense.any()):
        part = query[dense], target[dense], targets[dense], excluded.pick(dense)
        rank[dense], log_prob[dense] = dense_stats(table, *part)
    return rank, log_prob


def _fused_stats(
    table: Table,
    fused: FusedScan,
    query: Queries,
    target: torch.Tensor,
    targets: torch.Tensor,
    excluded: ExcludedPairs,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ranks and log-probabilities; None where some row's score cannot be bounded, or too many lie
    within the bound."""
    batch = targets.shape[0]
    origin = Origin.of(query, table.rows[targets], fused.offset)
    out = excluded.adding(targets)
    contest = extension.Contest(
        origin.raw,
        origin.rounded,
        origin.logit,
        origin.moved.exp2(),
        out.keys(),
    )
    found = fused.stats(contest, _MOST_NEAR)
    if not found.complete:
        return None
    rank = 1 + found.ahead
    near = found.near % batch, found.near // batch
    rank += count_ahead(table, query, target, targets, *near)
    return rank, origin.log_prob(found.peak, found.mass)


class _Scan:
    """The running ranks and log-sum-exps of a batch. Scores are [rows of the block, B]."""

    def __init__(
        self,
        table: Table,
        first_pass: CoarseScan,
        query: Queries,
        target: torch.Tensor,
        targets: torch.Tensor,
        patient: bool,
    ) -> None:
        """patient: go on however much lies within the error bound."""
        self.table, self.first_pass, self.query = table, first_pass, query
        self.target, self.targets = target, targets
        self.origin = Origin.of(query, table.rows[targets], first_pass.offset)
        self.peak = torch.zeros_like(target)
        self.mass = self.origin.moved.exp2()
        self.rank = torch.ones_like(targets)
        self.above: torch.Tensor | None = None  # memory in the order of the scores
        self.reach: torch.Tensor | None = None
        self.near: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_near = 0
        share = 1.0 if patient else max(NEAR_SHARE, NEAR_SHARE_ONE / targets.shape[0])
        self.most_near = share * targets.shape[0]  # of a row

    def run(self, excluded: ExcludedPairs) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scan all rows but the targets. Returns ranks and log-probabilities; None where some row's
        score cannot be bounded, or too many lie within the bound."""
        excluded = excluded.adding(self.targets)
        height = self.first_pass.height
        for start in range(0, self.table.rows.shape[0], height):
            stop = min(start + height, self.table.rows.shape[0])
            scores, error, doubtful = self.first_pass.score(start, stop)
            if doubtful is not None:
                return None
            excluded.mask(start, stop, scores, -torch.inf)
            best = group_best(scores)
            if self._count(scores, best, error, start) > self.most_near * (stop - start):
                return None
            self._add(scores, best)
        self._settle()
        return self.rank, self.origin.log_prob(self.peak, self.mass)

    def _count(
        self, scores: torch.Tensor, best: torch.Tensor, error: torch.Tensor, start: int
    ) -> int:
        """Count what is ahead for certain; returns how many pairs are not."""
        # both canonical roundings and that of the two limits
        error = error.double() + self.origin.raw.abs() * 4 * UNIT
        high, low = (self.origin.raw + error).float(), (self.origin.raw - error).float()
        opened = best >= low
        if int(opened.sum()) * FEW_GROUPS < opened.numel():
            of, row, score = entries_from(scores, *opened.T.nonzero(as_tuple=True), low)
            sure = score > high[of]
            self.rank += torch.bincount(of[sure], minlength=self.rank.numel())
            of, row = of[~sure], row[~sure]
        else:
            if self.above is None or self.above.shape != scores.shape:
                self.above, self.reach = torch.empty_like(scores), torch.empty_like(scores)
            above = torch.gt(scores, high, out=self.above)
            self.rank += _sum_rows(above).long()
            near = torch.ge(scores, low, out=self.reach).sub_(above)
            some = near.amax(1).nonzero()[:, 0]
            row, of = near[some].nonzero(as_tuple=True)
            row = some[row]
        if of.numel():
            self.near.append((of, row + start))
            self.num_near += of.numel()
            if self.num_near * self.table.rows.shape[1] > common.PAIR_ELEMENTS:
                self._settle()
        return of.numel()

    def _settle(self) -> None:
        """Compare the near pairs' canonical scores with the target's."""
        if not self.near:
            return
        of, at = (torch.cat(parts) for parts in zip(*self.near, strict=True))
        self.near, self.num_near = [], 0
        self.rank += count_ahead(self.table, self.query, self.target, self.targets, of, at)

    def _add(self, scores: torch.Tensor, best: torch.Tensor) -> None:
        """Fold a block into the log-sum-exp; overwrites the scores."""
        scores.sub_(self.origin.rounded)
        best = best.amax(0) - self.origin.rounded
        peak = torch.maximum(self.peak, best * self.origin.logit)
        self.mass *= (self.peak - peak).double().exp2()
        e = torch.addcmul(-peak, scores, self.origin.logit, out=scores).exp2_()
        self.mass += _sum_rows(e)
        self.peak = peak


def _fold(scores: torch.Tensor) -> torch.Tensor:
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
    return _fold(scores).sum(0).view(-1, scores.shape[1]).sum(0)

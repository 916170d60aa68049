"""The reward room in plain torch: one pass over the items in blocks, any device.

``certified_stats`` counts the items ahead of the target by a first pass with its error bound and
settles what lies within the bound by canonical scores, so that ranks are exact.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from .. import compiled
from ..canonical import canonical_scores
from ..exclude import exclude_rows
from ..search.bounds import UNIT, Queries, prepare_queries
from ..search.engine import FirstPass, Table, entries_from, group_best
from ..search.impl_torch import Float32Pass
from ..search.plain import PlainTable
from . import exact
from .exact import Origin, Pairs, count_settled, dense_stats

# Share of the scores within the error bound of the target from which settling them costs more than
# a narrower bound, for many queries and for one.
NEAR_SHARE, NEAR_SHARE_ONE = 0.003, 0.05
FEW_GROUPS = 8  # where an eighth of the groups reach the target, all scores are compared with it
_MOST_NEAR = 1 << 22  # pairs that the compiled pass may leave to be settled
SPLIT_BATCH = 32  # queries from which products are split in two: half the error bound, 3% time


def recpo_reward(
    rank: torch.Tensor, log_prob: torch.Tensor, softmax_weight: float, ndcg_k: int
) -> torch.Tensor:
    gain = torch.where(rank <= ndcg_k, torch.log2(rank.double() + 1).reciprocal(), 0.0)
    return softmax_weight * log_prob.double().exp() + (1 - softmax_weight) * gain


def grouped_advantage(
    rewards: torch.Tensor, estimator: str, best: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages (float64) and best trajectories of [B, G] rewards."""
    group = rewards.shape[1]
    values = rewards.double()
    order = torch.sort(values, dim=1, descending=True, stable=True).indices
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order[:, :best], True)
    if group == 1:
        return torch.ones_like(values), chosen
    centred = values - values.mean(1, keepdim=True)
    if estimator == "grpo":
        variance = centred.square().sum(1, keepdim=True) / (group - 1)
        advantages = centred / (variance.sqrt() + 1e-8)
    else:
        advantages = centred * (group / (group - 1))
    tied = values.amax(1, keepdim=True) == values.amin(1, keepdim=True)
    return advantages.masked_fill(tied, 0.0), chosen


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
    of = exclude_rows(exclude_offsets, exclude_values.numel())
    passes = row_passes(items, None, queries.shape[0])
    return certified_stats(PlainTable(items), passes, query, targets, of, exclude_values)


class FusedPass(Protocol):
    """A pass that ranks and sums while it makes the scores. ``offset``: what the raw scores leave
    out, float64 [B] or 0."""

    @property
    def offset(self) -> torch.Tensor | float: ...

    def stats(self, contest: compiled.Contest, most_near: int) -> compiled.Stats: ...


@dataclass(frozen=True)
class FusedRows:
    """The compiled pass over the rows themselves."""

    rows: torch.Tensor
    query: Queries
    offset: float = 0.0

    def stats(self, contest: compiled.Contest, most_near: int) -> compiled.Stats:
        return compiled.stats(self.rows, self.query, contest, most_near)


StatsPass = Callable[[Queries], FirstPass | FusedPass]


def row_passes(rows: torch.Tensor, norms: torch.Tensor | None, batch: int) -> list[StatsPass]:
    """The passes over rows [N, d] themselves; norms: [N], or None: not known."""
    fused: list[StatsPass] = [partial(FusedRows, rows)] if compiled.fits(rows, batch) else []
    return [*fused, partial(_float32_pass, rows, norms)]


def _float32_pass(rows: torch.Tensor, norms: torch.Tensor | None, query: Queries) -> Float32Pass:
    """The rows' own products, in two parts for many queries: what lies within the error bound of a
    target costs more there than the second part."""
    parts = 2 if query.scaled.shape[0] >= SPLIT_BATCH and rows.shape[1] > 1 else 1
    return Float32Pass(rows, norms, query, parts)


def certified_stats(
    table: Table,
    passes: Sequence[StatsPass],
    query: Queries,
    targets: torch.Tensor,
    exclude_of: torch.Tensor,
    exclude_rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) of targets among the rows of a table.

    Args:
        table: the rows, and the ids by which equal scores are ordered.
        passes: first passes, the next one for when too much lies within the bound of the one
            before; where the last cannot bound a row's score, canonical scores of all rows.
        query: the prepared batch.
        targets: int64 [B], row positions; a target competes even where it is excluded.
        exclude_of, exclude_rows: int64 [E], queries and row positions that do not compete.
    """
    batch, device = query.original.shape[0], query.original.device
    left_out = Pairs.sort(exclude_of, exclude_rows).without(targets)
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
                found = _fused_stats(table, first_pass, part, *own, left_out.pick(scanned))
            else:
                scan = _Scan(table, first_pass, part, *own, patient=position == len(passes))
                found = scan.run(left_out.pick(scanned))
            if found is not None:
                break
        if found is not None:
            rank[scanned], log_prob[scanned] = found
        else:
            dense[:] = True
    if bool(dense.any()):
        part = query[dense], target[dense], targets[dense], left_out.pick(dense)
        rank[dense], log_prob[dense] = dense_stats(table.rows, table.ids, *part)
    return rank, log_prob


def _fused_stats(
    table: Table,
    fused: FusedPass,
    query: Queries,
    target: torch.Tensor,
    targets: torch.Tensor,
    left_out: Pairs,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Ranks and log-probabilities; None where some row's score cannot be bounded, or too many lie
    within the bound."""
    batch = targets.shape[0]
    origin = Origin.of(query, table.rows[targets], fused.offset)
    out = left_out.adding(targets)
    contest = compiled.Contest(
        origin.raw,
        origin.rounded,
        origin.logit,
        origin.moved.exp2(),
        out.rows * batch + out.of,
    )
    found = fused.stats(contest, _MOST_NEAR)
    if not found.complete:
        return None
    rank = 1 + found.ahead
    near = found.near % batch, found.near // batch
    rank += count_settled(table.rows, table.ids, query, target, targets, *near)
    return rank, origin.log_prob(found.peak, found.mass)


class _Scan:
    """The running ranks and log-sum-exps of a batch. Scores are [rows of the block, B]."""

    def __init__(
        self,
        table: Table,
        first_pass: FirstPass,
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

    def run(self, left_out: Pairs) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scan all rows but the targets. Returns ranks and log-probabilities; None where some row's
        score cannot be bounded, or too many lie within the bound."""
        left_out = left_out.adding(self.targets)
        height = self.first_pass.height
        for start in range(0, self.table.rows.shape[0], height):
            stop = min(start + height, self.table.rows.shape[0])
            scores, error, doubtful = self.first_pass.score(start, stop)
            if doubtful is not None:
                return None
            left_out.mask(start, stop, scores, -torch.inf)
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
            if self.num_near * self.table.rows.shape[1] > exact.PAIR_ELEMENTS:
                self._settle()
        return of.numel()

    def _settle(self) -> None:
        """Compare the near pairs' canonical scores with the target's."""
        if not self.near:
            return
        of, at = (torch.cat(parts) for parts in zip(*self.near, strict=True))
        self.near, self.num_near = [], 0
        self.rank += count_settled(
            self.table.rows, self.table.ids, self.query, self.target, self.targets, of, at
        )

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

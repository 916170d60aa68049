"""The reward room in plain torch: one pass over the items in blocks, any device.

``certified_stats`` counts the items ahead of the target by float32 products with their error bound
and settles what lies within the bound by canonical scores, so that ranks are exact.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from ..canonical import canonical_scores
from ..exclude import exclude_rows
from ..search.bounds import HUGE, Queries, prepare_queries

BLOCK_ELEMENTS = 1 << 21  # of a block's rows and scores: they stay in the last-level cache
MIN_BLOCK = 256  # item rows of a block, at least
SPLIT_BATCH = 32  # queries from which products are split in two: half the error bound, 3% time
PAIR_ELEMENTS = 1 << 20  # elements of the rows gathered at once to settle near-ties
LOG2_E = math.log2(math.e)
_UNIT = 2.0**-24


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
    return certified_stats(items, None, None, query, targets, of, exclude_values)


def certified_stats(
    rows: torch.Tensor,
    ids: torch.Tensor | None,
    norms: torch.Tensor | None,
    query: Queries,
    targets: torch.Tensor,
    exclude_of: torch.Tensor,
    exclude_rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) of targets among the rows of a table.

    Args:
        rows: [N, d].
        ids: int64 [N], by which equal scores are ordered; None: positions.
        norms: float32 [N] of the rows; None: taken on the way.
        query: the prepared batch.
        targets: int64 [B], row positions; a target competes even where it is excluded.
        exclude_of, exclude_rows: int64 [E], queries and row positions that do not compete.
    """
    batch, device = query.original.shape[0], query.original.device
    left_out = _Pairs.sort(exclude_of, exclude_rows).without(targets)
    rank = torch.ones(batch, dtype=torch.int64, device=device)
    log_prob = torch.zeros(batch, device=device)
    if batch == 0:
        return rank, log_prob
    own = rows[targets][:, None]
    target = canonical_scores(query.original, own, query.similarity, query.temperature)[:, 0]
    # A distance from a float32 square loses its digits where the query is near the item.
    dense = query.dense | ~torch.isfinite(target) | (query.similarity == "l2")
    scanned = ~dense
    if bool(scanned.any()):
        scan = _Scan(rows, ids, norms, query[scanned], target[scanned], targets[scanned])
        if scan.run(left_out.pick(scanned)):
            rank[scanned], log_prob[scanned] = scan.rank, scan.log_prob()
        else:
            dense[:] = True
    if bool(dense.any()):
        part = query[dense], target[dense], targets[dense], left_out.pick(dense)
        rank[dense], log_prob[dense] = _dense_stats(rows, ids, *part)
    return rank, log_prob


class _Pairs(NamedTuple):
    """(query, row) pairs ordered by row."""

    of: torch.Tensor  # int64 [E]
    rows: torch.Tensor  # int64 [E]

    @classmethod
    def sort(cls, of: torch.Tensor, rows: torch.Tensor) -> "_Pairs":
        order = torch.argsort(rows)
        return cls(of[order], rows[order])

    def without(self, targets: torch.Tensor) -> "_Pairs":
        """The pairs other than (b, targets[b])."""
        kept = self.rows != targets[self.of]
        return _Pairs(self.of[kept], self.rows[kept])

    def pick(self, chosen: torch.Tensor) -> "_Pairs":
        """The pairs of the queries in ``chosen`` (bool [B]), renumbered."""
        kept = chosen[self.of]
        return _Pairs((chosen.cumsum(0) - 1)[self.of[kept]], self.rows[kept])

    def adding(self, targets: torch.Tensor) -> "_Pairs":
        """These pairs and (b, targets[b])."""
        own = torch.arange(targets.numel(), device=targets.device)
        return _Pairs.sort(torch.cat([self.of, own]), torch.cat([self.rows, targets]))

    def mask(self, start: int, stop: int, scores: torch.Tensor, value: float) -> None:
        """Set these entries of ``scores`` [stop - start, B] to ``value``."""
        edges = torch.tensor([start, stop], device=self.rows.device)
        low, high = torch.searchsorted(self.rows, edges).tolist()
        if high > low:
            scores[self.rows[low:high] - start, self.of[low:high]] = value


class _Scan:
    """The running ranks and log-sum-exps of a batch. Scores are [rows of the block, B]."""

    def __init__(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor | None,
        norms: torch.Tensor | None,
        query: Queries,
        target: torch.Tensor,
        targets: torch.Tensor,
    ) -> None:
        self.rows, self.ids, self.norms = rows, ids, norms
        self.target, self.targets = target, targets
        d = rows.shape[1]
        parts = 2 if targets.shape[0] >= SPLIT_BATCH and d > 1 else 1
        self.chunk = -(-d // parts)
        # d products summed in ``parts`` sums: (chunk + parts) roundings instead of d
        saved = max(0, d - self.chunk - parts)
        self.query = replace(query, unit=query.unit - saved * _UNIT)
        self.operand = query.scaled.T.contiguous()
        own = rows[targets].double()
        raw = (query.original.double() * query.scale[:, None] * own).sum(1)
        self.logit = LOG2_E / (query.scale * query.temperature)  # of a raw score, in log 2
        if query.similarity == "cosine":
            norm = torch.linalg.vector_norm(own, dim=1)
            raw = raw / torch.where(norm == 0, 1.0, norm)
            length = torch.linalg.vector_norm(query.original.double(), dim=1) * query.scale
            self.logit = LOG2_E / (torch.where(length == 0, 1.0, length) * query.temperature)
        # Log-sum-exps are taken relative to the target, whose own term they start with. ``origin``
        # is its raw score in float32, ``moved`` what that rounding moves all other terms by.
        self.raw, self.origin = raw, raw.float()
        self.moved = (raw - self.origin.double()) * self.logit
        self.logit = self.logit.float()
        self.peak = torch.zeros_like(target)
        self.mass = self.moved.exp2()
        batch = targets.shape[0]
        self.height = max(MIN_BLOCK, BLOCK_ELEMENTS // (d + 3 * batch)) // 8 * 8
        self.buffers = rows.new_empty(3, self.height * batch, dtype=torch.float32)
        self.rank = torch.ones_like(targets)
        self.near: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_near = 0

    def run(self, left_out: _Pairs) -> bool:
        """Scan all rows but the targets; False where some row's score cannot be bounded."""
        left_out = left_out.adding(self.targets)
        batch = self.targets.shape[0]
        for start in range(0, self.rows.shape[0], self.height):
            stop = min(start + self.height, self.rows.shape[0])
            scores, above, reach = (
                buffer[: (stop - start) * batch].view(-1, batch) for buffer in self.buffers
            )
            error = self._score(start, stop, scores)
            if error is None:
                return False
            left_out.mask(start, stop, scores, -torch.inf)
            self._count(scores, error, start, above, reach)
            self._add(scores)
        self._settle()
        return True

    def _score(self, start: int, stop: int, out: torch.Tensor) -> torch.Tensor | None:
        """Raw scores of a block (``search.bounds``) and the bound of their errors, [B]."""
        block = self.rows[start:stop].float()
        torch.mm(block[:, : self.chunk], self.operand[: self.chunk], out=out)
        for at in range(self.chunk, block.shape[1], self.chunk):
            part = slice(at, at + self.chunk)
            out.addmm_(block[:, part], self.operand[part])
        if self.norms is None:
            norms = torch.linalg.vector_norm(block, dim=1)
        else:
            norms = self.norms[start:stop]
        high = norms.amax()
        if self.query.similarity == "cosine":
            low = norms.amin()
            if low < 1 / HUGE and bool(((norms < 1 / HUGE) & (block != 0).any(1)).any()):
                return None
            out.mul_(torch.where(norms > 0, norms.reciprocal(), 0.0)[:, None])
        if not high <= HUGE:
            return None
        # squares below float32's normal range may be lost from the norm
        return self.query.product_error(high * 1.001 + math.sqrt(block.shape[1]) * 2.0**-62)

    def _count(
        self,
        scores: torch.Tensor,
        error: torch.Tensor,
        start: int,
        above: torch.Tensor,
        reach: torch.Tensor,
    ) -> None:
        # both canonical roundings and that of the two limits
        error = error.double() + self.raw.abs() * 4 * _UNIT
        high, low = (self.raw + error).float(), (self.raw - error).float()
        self.rank += _sum_rows(torch.gt(scores, high, out=above)).long()
        near = torch.ge(scores, low, out=reach).sub_(above)
        some = near.amax(1).nonzero()[:, 0]
        if some.numel():
            row, of = near[some].nonzero(as_tuple=True)
            self.near.append((of, some[row] + start))
            self.num_near += of.numel()
            if self.num_near * self.rows.shape[1] > PAIR_ELEMENTS:
                self._settle()

    def _settle(self) -> None:
        """Compare the near pairs' canonical scores with the target's."""
        if not self.near:
            return
        of, at = (torch.cat(parts) for parts in zip(*self.near, strict=True))
        self.near, self.num_near = [], 0
        step = max(1, PAIR_ELEMENTS // self.rows.shape[1])
        for first in range(0, of.numel(), step):
            who, row = of[first : first + step], at[first : first + step]
            query = self.query
            found = canonical_scores(
                query.original[who], self.rows[row][:, None], query.similarity, query.temperature
            )[:, 0]
            target = self.target[who]
            before = _before(self.ids, row, self.targets[who])
            wins = (found > target) | ((found == target) & before)
            self.rank.index_add_(0, who, wins.long())

    def _add(self, scores: torch.Tensor) -> None:
        """Fold a block into the log-sum-exp; overwrites the scores."""
        scores.sub_(self.origin)
        peak = torch.maximum(self.peak, _max_rows(scores) * self.logit)
        self.mass *= (self.peak - peak).double().exp2()
        e = torch.addcmul(-peak, scores, self.logit, out=scores).exp2_()
        self.mass += _sum_rows(e)
        self.peak = peak

    def log_prob(self) -> torch.Tensor:
        """float32 [B]."""
        return ((self.moved - self.peak.double() - self.mass.log2()) / LOG2_E).float()


def _fold(scores: torch.Tensor) -> torch.Tensor:
    """[n, B] as [n / f, f, B] flattened to wide rows: reductions over few columns are slow."""
    rows, batch = scores.shape
    wide = 1
    while wide * batch < 128 and rows % (2 * wide) == 0:
        wide *= 2
    return scores.view(rows // wide, wide * batch)


def _sum_rows(scores: torch.Tensor) -> torch.Tensor:
    """Sum [n, B] over n; exact for fewer than 2^24 ones."""
    return _fold(scores).sum(0).view(-1, scores.shape[1]).sum(0)


def _max_rows(scores: torch.Tensor) -> torch.Tensor:
    return _fold(scores).amax(0).view(-1, scores.shape[1]).amax(0)


def _dense_stats(
    rows: torch.Tensor,
    ids: torch.Tensor | None,
    query: Queries,
    target: torch.Tensor,
    targets: torch.Tensor,
    left_out: _Pairs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical scores of every row, block by block."""
    rank = torch.ones_like(targets)
    lse = torch.full_like(target, -torch.inf, dtype=torch.float64)
    batch = targets.shape[0]
    height = max(MIN_BLOCK, BLOCK_ELEMENTS // (rows.shape[1] + 3 * batch))
    for start in range(0, rows.shape[0], height):
        stop = min(start + height, rows.shape[0])
        scores = canonical_scores(
            query.original, rows[start:stop], query.similarity, query.temperature
        )
        at = torch.arange(start, stop, device=rows.device)
        before = _before(ids, at, targets[:, None])
        ahead = (scores > target[:, None]) | ((scores == target[:, None]) & before)
        left_out.mask(start, stop, ahead.T, False)
        left_out.mask(start, stop, scores.T, -torch.inf)
        rank += ahead.sum(1)
        lse = torch.logaddexp(lse, scores.double().logsumexp(1))
    return rank, (target.double() - lse).float()


def _before(ids: torch.Tensor | None, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether the id of each row is lower than the target's."""
    return rows < targets if ids is None else ids[rows] < ids[targets]

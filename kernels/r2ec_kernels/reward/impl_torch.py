"""The reward room in plain torch: one pass over the items in blocks, any device.

``certified_stats`` counts the items ahead of the target by float32 products with their error bound
and settles what lies within the bound by canonical scores, so that ranks are exact.
"""

import math
from dataclasses import replace

import torch

from ..canonical import canonical_scores
from ..exclude import exclude_rows
from ..search.bounds import HUGE, Queries, prepare_queries
from . import exact
from .exact import LOG2_E, UNIT, Origin, Pairs, count_settled, dense_stats

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
    left_out = Pairs.sort(exclude_of, exclude_rows).without(targets)
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
        rank[dense], log_prob[dense] = dense_stats(rows, ids, *part)
    return rank, log_prob


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
        self.query = replace(query, unit=query.unit - saved * UNIT)
        self.operand = query.scaled.T.contiguous()
        self.origin = Origin.of(query, rows[targets])
        self.peak = torch.zeros_like(target)
        self.mass = self.origin.moved.exp2()
        batch = targets.shape[0]
        self.height = max(exact.MIN_BLOCK, exact.BLOCK_ELEMENTS // (d + 3 * batch)) // 8 * 8
        self.buffers = rows.new_empty(3, self.height * batch, dtype=torch.float32)
        self.rank = torch.ones_like(targets)
        self.near: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_near = 0

    def run(self, left_out: Pairs) -> bool:
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
        error = error.double() + self.origin.raw.abs() * 4 * UNIT
        high, low = (self.origin.raw + error).float(), (self.origin.raw - error).float()
        self.rank += _sum_rows(torch.gt(scores, high, out=above)).long()
        near = torch.ge(scores, low, out=reach).sub_(above)
        some = near.amax(1).nonzero()[:, 0]
        if some.numel():
            row, of = near[some].nonzero(as_tuple=True)
            self.near.append((of, some[row] + start))
            self.num_near += of.numel()
            if self.num_near * self.rows.shape[1] > exact.PAIR_ELEMENTS:
                self._settle()

    def _settle(self) -> None:
        """Compare the near pairs' canonical scores with the target's."""
        if not self.near:
            return
        of, at = (torch.cat(parts) for parts in zip(*self.near, strict=True))
        self.near, self.num_near = [], 0
        self.rank += count_settled(
            self.rows, self.ids, self.query, self.target, self.targets, of, at
        )

    def _add(self, scores: torch.Tensor) -> None:
        """Fold a block into the log-sum-exp; overwrites the scores."""
        scores.sub_(self.origin.rounded)
        peak = torch.maximum(self.peak, _max_rows(scores) * self.origin.logit)
        self.mass *= (self.peak - peak).double().exp2()
        e = torch.addcmul(-peak, scores, self.origin.logit, out=scores).exp2_()
        self.mass += _sum_rows(e)
        self.peak = peak

    def log_prob(self) -> torch.Tensor:
        """float32 [B]."""
        return ((self.origin.moved - self.peak.double() - self.mass.log2()) / LOG2_E).float()


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

"""What the implementations of target_stats share: pairs, exact comparisons, the dense path."""

import math
from typing import NamedTuple

import torch

from ..canonical import canonical_scores, pair_scores
from ..search.bounds import Queries

BLOCK_ELEMENTS = 1 << 21  # of a block's rows and scores: they stay in the last-level cache
MIN_BLOCK = 256  # item rows of a block, at least
PAIR_ELEMENTS = 1 << 20  # elements of the rows gathered at once to settle near-ties
LOG2_E = math.log2(math.e)


class Pairs(NamedTuple):
    """(query, row) pairs ordered by row."""

    of: torch.Tensor  # int64 [E]
    rows: torch.Tensor  # int64 [E]

    @classmethod
    def sort(cls, of: torch.Tensor, rows: torch.Tensor) -> "Pairs":
        order = torch.argsort(rows)
        return cls(of[order], rows[order])

    def without(self, targets: torch.Tensor) -> "Pairs":
        """The pairs other than (b, targets[b])."""
        kept = self.rows != targets[self.of]
        return Pairs(self.of[kept], self.rows[kept])

    def pick(self, chosen: torch.Tensor) -> "Pairs":
        """The pairs of the queries in ``chosen`` (bool [B]), renumbered."""
        kept = chosen[self.of]
        return Pairs((chosen.cumsum(0) - 1)[self.of[kept]], self.rows[kept])

    def adding(self, targets: torch.Tensor) -> "Pairs":
        """These pairs and (b, targets[b])."""
        own = torch.arange(targets.numel(), device=targets.device)
        return Pairs.sort(torch.cat([self.of, own]), torch.cat([self.rows, targets]))

    def mask(self, start: int, stop: int, scores: torch.Tensor, value: float) -> None:
        """Set these entries of ``scores`` [stop - start, B] to ``value``."""
        edges = torch.tensor([start, stop], device=self.rows.device)
        low, high = torch.searchsorted(self.rows, edges).tolist()
        if high > low:
            scores[self.rows[low:high] - start, self.of[low:high]] = value


class Origin(NamedTuple):
    """The target's raw score (``search.bounds``) as a first pass counts it, to which all scores of
    a query are compared.

    Log-sum-exps are taken relative to the target, whose own term they start with.
    """

    raw: torch.Tensor  # float64 [B]
    rounded: torch.Tensor  # float32 [B], what is subtracted from raw scores
    logit: torch.Tensor  # float32 [B], of a unit of raw score, in units of log 2
    moved: torch.Tensor  # float64 [B], what that rounding moves all other terms by

    @classmethod
    def of(cls, query: Queries, own: torch.Tensor, offset: torch.Tensor | float = 0.0) -> "Origin":
        """own: [B, d], the targets' rows; offset: float64 [B], what the pass leaves out."""
        own = own.double()
        raw = (query.original.double() * query.scale[:, None] * own).sum(1)
        if query.similarity == "cosine":
            norm = torch.linalg.vector_norm(own, dim=1)
            raw = raw / torch.where(norm == 0, 1.0, norm)
        logit = LOG2_E / raw_per_score(query)
        raw = raw - offset
        return cls(raw, raw.float(), logit.float(), (raw - raw.float().double()) * logit)

    def log_prob(self, peak: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """The targets' log-probabilities, float32 [B], of a pass's largest logits and its sums
        (``compiled.Stats``)."""
        return ((self.moved - peak.double() - mass.log2()) / LOG2_E).float()


def raw_per_score(query: Queries) -> torch.Tensor:
    """float64 [B]: raw scores (``search.bounds``) that make one score, for dot and cosine."""
    length = query.scale
    if query.similarity == "cosine":
        length = torch.linalg.vector_norm(query.original.double(), dim=1) * query.scale
        length = torch.where(length == 0, 1.0, length)
    return length * query.temperature


def count_settled(
    rows: torch.Tensor,
    ids: torch.Tensor | None,
    query: Queries,
    target: torch.Tensor,
    targets: torch.Tensor,
    of: torch.Tensor,
    at: torch.Tensor,
) -> torch.Tensor:
    """How many of the pairs (query ``of``, row ``at``) are ahead of their targets, int64 [B]."""
    found = pair_scores(query.original, rows, of, at, query.similarity, query.temperature)
    first = before(ids, at, targets[of])
    wins = (found > target[of]) | ((found == target[of]) & first)
    return torch.zeros_like(targets).index_add_(0, of, wins.long())


def dense_stats(
    rows: torch.Tensor,
    ids: torch.Tensor | None,
    query: Queries,
    target: torch.Tensor,
    targets: torch.Tensor,
    left_out: Pairs,
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
        first = before(ids, at, targets[:, None])
        ahead = (scores > target[:, None]) | ((scores == target[:, None]) & first)
        left_out.mask(start, stop, ahead.T, False)
        left_out.mask(start, stop, scores.T, -torch.inf)
        rank += ahead.sum(1)
        lse = torch.logaddexp(lse, scores.double().logsumexp(1))
    return rank, (target.double() - lse).float()


def before(ids: torch.Tensor | None, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether the id of each row is lower than the target's."""
    return rows < targets if ids is None else ids[rows] < ids[targets]

"""What the implementations of target_stats share: origins, exact comparisons, the dense path."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..._exact.bounds import Queries
from ..._exact.excluded import ExcludedPairs
from ..._exact.scores import canonical_scores, halving_sum
from ..._exact.table import Table
from ..._numbers import LOG2_E
from ..._scan.rescore import pair_scores

BLOCK_ELEMENTS = 1 << 21  # of a block's rows and scores: they stay in the last-level cache
MIN_BLOCK = 256  # item rows of a block, at least
PAIR_ELEMENTS = 1 << 20  # elements of the rows gathered at once to compare near-ties exactly


@dataclass(frozen=True)
class Targets:
    """The targets of a batch: what a table's rows are compared with.

    Attributes:
        at: int64 [B], row positions. A foreign target, which is none of the table's rows, stands at
            -1, before all of them, or at N, behind them; such a table has no ids of its own.
        rows: [B, d], their stored values.
        score: float32 [B], their canonical scores.
        foreign: bool [B], which are foreign; None: none of them.
    """

    at: torch.Tensor
    rows: torch.Tensor
    score: torch.Tensor
    foreign: torch.Tensor | None = None

    @classmethod
    def of(
        cls, table: Table, query: Queries, at: torch.Tensor, rows: torch.Tensor | None = None
    ) -> "Targets":
        """rows: [B, d], the targets' values, some of them foreign; None: the table's own."""
        foreign = None
        if rows is None:
            rows = table.rows[at]
        else:
            foreign = (at < 0) | (at >= len(table))
        scoring = query.similarity, query.temperature
        score = canonical_scores(query.original, rows[:, None], *scoring)[:, 0]
        return cls(at, rows, score, foreign)

    def pick(self, chosen: torch.Tensor) -> "Targets":
        """Those of the queries in ``chosen``, bool [B]."""
        foreign = None if self.foreign is None else self.foreign[chosen]
        return Targets(self.at[chosen], self.rows[chosen], self.score[chosen], foreign)

    def beside(self, table: Table) -> torch.Tensor:
        """bool [B]: those that compete beside the table's allowed rows."""
        if self.foreign is None:
            if table.allowed is None:
                return torch.zeros_like(self.at, dtype=torch.bool)
            return ~table.allowed[self.at]
        if table.allowed is None or not len(table):
            return self.foreign
        return self.foreign | ~table.allowed[self.at.clamp(0, len(table) - 1)]

    def added_to(self, excluded: ExcludedPairs) -> ExcludedPairs:
        """``excluded`` and the targets' own pairs, of those that are rows of the table."""
        if self.foreign is None:
            return excluded.adding(self.at)
        added = excluded.adding(torch.where(self.foreign, -1, self.at))
        return added.pairs_where(added.rows >= 0)


class Origin(NamedTuple):
    """The target's raw score (``_exact.bounds``) as a coarse scan counts it, with which all scores
    of a query are compared.

    Log-sum-exps are taken relative to the target, whose own term they start with.
    """

    raw: torch.Tensor  # float64 [B]
    rounded: torch.Tensor  # float32 [B], what is subtracted from raw scores
    logit: torch.Tensor  # float32 [B], of a unit of raw score, in units of log 2
    moved: torch.Tensor  # float64 [B], what that rounding moves all other terms by

    @classmethod
    def of(cls, query: Queries, own: torch.Tensor, offset: torch.Tensor | float = 0.0) -> "Origin":
        """own: [B, d], the targets' rows; offset: float64 [B], what the scan leaves out.

        The products are summed as the canonical score sums them: where large ones cancel, another
        order could be further off than a scan's bound, which knows the scanned rows alone.
        """
        own = own.double()
        raw = halving_sum(query.original.double() * own) * query.scale
        if query.similarity == "cosine":
            norm = torch.linalg.vector_norm(own, dim=1)
            raw = raw / torch.where(norm == 0, 1.0, norm)
        logit = LOG2_E / raw_per_score(query)
        raw = raw - offset
        return cls(raw, raw.float(), logit.float(), (raw - raw.float().double()) * logit)

    def log_prob(self, m: torch.Tensor, l: torch.Tensor) -> torch.Tensor:
        """The targets' log-probabilities, float32 [B], of a scan's largest logits and its sums
        (``_cpu.extension.Stats``)."""
        return ((self.moved - m.double() - l.log2()) / LOG2_E).float()


def raw_per_score(query: Queries) -> torch.Tensor:
    """float64 [B]: raw scores (``_exact.bounds``) that make one score, for dot and cosine."""
    length = query.scale
    if query.similarity == "cosine":
        length = torch.linalg.vector_norm(query.original.double(), dim=1) * query.scale
        length = torch.where(length == 0, 1.0, length)
    return length * query.temperature


def count_ahead(
    table: Table,
    query: Queries,
    targets: Targets,
    of: torch.Tensor,
    at: torch.Tensor,
) -> torch.Tensor:
    """How many of the pairs (query ``of``, row ``at``) are ahead of their targets, int64 [B]."""
    found = pair_scores(table, query, of, at)
    first, score = table.before(at, targets.at[of]), targets.score[of]
    wins = (found > score) | ((found == score) & first)
    return torch.zeros_like(targets.at).index_add_(0, of, wins.long())


def dense_stats(
    table: Table,
    query: Queries,
    targets: Targets,
    excluded: ExcludedPairs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Canonical scores of every row, block by block.

    excluded: without the targets' own pairs, and those of rows that are not allowed. Log-sum-exps
    are taken relative to finite targets, so that large scores lose no digits. Scores that are not
    finite are counted apart, in blocks that have some: the log-sum-exp of a block shows them. A
    foreign target, which no block has, is counted first.
    """
    target, own = targets.score, targets.at[:, None]
    rank = torch.ones_like(targets.at)
    origin = torch.where(torch.isfinite(target), target, 0.0).double()[:, None]
    lse = torch.full_like(target, -torch.inf, dtype=torch.float64)
    at_top, unordered = torch.zeros_like(rank), torch.zeros_like(rank)
    if targets.foreign is not None:
        counted = targets.foreign & ~target.isnan()
        lse = torch.where(counted, target.double() - origin[:, 0], lse)
        at_top += targets.foreign & (target == torch.inf)
    batch, rows = rank.shape[0], table.rows
    height = max(MIN_BLOCK, BLOCK_ELEMENTS // (rows.shape[1] + 3 * batch))
    for start in range(0, rows.shape[0], height):
        stop = min(start + height, rows.shape[0])
        scores = canonical_scores(
            query.original, rows[start:stop], query.similarity, query.temperature
        )
        at = torch.arange(start, stop, device=rows.device)
        first = table.before(at, own)
        ahead = (scores > target[:, None]) | ((scores == target[:, None]) & first)
        if table.allowed is not None:
            off = ~table.allowed[start:stop] & (at != own)
            ahead &= ~off
            scores.masked_fill_(off, -torch.inf)
        excluded.mask(start, stop, ahead.T, False)
        excluded.mask(start, stop, scores.T, -torch.inf)
        rank += ahead.sum(1)
        block = scores.double().sub_(origin).logsumexp(1)
        if not bool(torch.isfinite(block).all()):
            at_top += (scores == torch.inf).sum(1)
            unordered += scores.isnan().sum(1)
            scores.masked_fill_(scores.isnan(), -torch.inf)
            block = scores.double().sub_(origin).logsumexp(1)
        lse = torch.logaddexp(lse, block)
    log_prob = (0.0 - lse).float()
    if bool((torch.isfinite(target) & torch.isfinite(lse)).all()):
        return rank, log_prob
    places = table.num_allowed - excluded.distinct_counts + targets.beside(table)
    return _beyond_finite(places, rank, log_prob, target, lse, at_top, unordered)


def _beyond_finite(
    places: torch.Tensor,
    rank: torch.Tensor,
    log_prob: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    at_top: torch.Tensor,
    unordered: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks and log-probabilities where a target or a log-sum-exp is not finite.

    A target that cannot be compared (NaN) takes the last place, the number of rows that compete,
    and has probability 0. Items at +inf share the mass equally; where all scores are -inf, all of
    them do.

    Args:
        places: int64 [B], how many rows compete.
        rank, log_prob: [B], right for finite targets among finite scores.
        target, lse: [B], canonical score, and log-sum-exp of the scores other than NaN (relative to
            the target where that is finite).
        at_top, unordered: int64 [B], how many scores are +inf and NaN.
    """
    sharing = torch.where(lse == torch.inf, at_top, places - unordered).clamp_min(1)
    share = -sharing.double().log().float()
    log_prob = torch.where(torch.isfinite(target) & torch.isfinite(lse), log_prob, -torch.inf)
    log_prob = torch.where(torch.isinf(lse) & (target == lse), share, log_prob)
    return torch.where(target.isnan(), places, rank), log_prob


def overflows(target: torch.Tensor, log_prob: torch.Tensor) -> torch.Tensor:
    """bool [B]: queries whose log-sum-exp comes so near to float32's end that some canonical score
    may be infinite, which a coarse scan does not see; NaN among them."""
    largest = 0.99 * torch.finfo(torch.float32).max
    return ~(target.double() - log_prob.double() < largest)

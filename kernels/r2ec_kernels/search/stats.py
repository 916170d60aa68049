"""Exact ranks and log-probabilities of targets over an index's rows, in one float32 pass."""

from collections.abc import Callable

import torch

from ..canonical import canonical_scores
from .bounds import Queries
from .engine import Excluded, FirstPass, Table

_PAIRS = 1 << 20  # elements of rows gathered at once to settle near-ties
_DENSE_BLOCK = 4096


def certified_stats(
    table: Table,
    first_pass: Callable[[Queries], FirstPass],
    query: Queries,
    targets: torch.Tensor,
    excluded: Excluded,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]).

    Args:
        targets: int64 [B], row positions; a target competes even where it is excluded.
    """
    batch, device = query.original.shape[0], query.original.device
    excluded = excluded.without(targets)
    rank = torch.ones(batch, dtype=torch.int64, device=device)
    log_prob = torch.zeros(batch, device=device)
    if batch == 0:
        return rank, log_prob
    own = table.rows[targets][:, None]
    target = canonical_scores(query.original, own, query.similarity, query.temperature)[:, 0]
    # -sqrt(|q|^2 - 2 g) loses a float32 g's digits where q is near x.
    dense = torch.ones_like(query.dense) if query.similarity == "l2" else query.dense.clone()
    chosen = ~dense
    if bool(chosen.any()):
        part = query[chosen]
        state = _Scanned(table, first_pass(part), part, target[chosen], targets[chosen])
        if state.run(excluded.pick(chosen)):
            rank[chosen], log_prob[chosen] = state.rank, state.log_prob()
        else:
            dense[:] = True
    if bool(dense.any()):
        found = _dense_stats(table, query[dense], target[dense], targets[dense], excluded, dense)
        rank[dense], log_prob[dense] = found
    return rank, log_prob


class _Scanned:
    """The running rank and log-sum-exp of a float32 pass."""

    def __init__(
        self,
        table: Table,
        scan: FirstPass,
        query: Queries,
        target: torch.Tensor,
        targets: torch.Tensor,
    ) -> None:
        self.table, self.query, self.target, self.targets = table, query, target, targets
        self.scan = scan
        rows = table.rows[targets].double()
        raw = (query.original.double() * query.scale[:, None] * rows).sum(1)
        self.logit = 1.0 / (query.scale * query.temperature)
        if query.similarity == "cosine":
            norm = torch.linalg.vector_norm(rows, dim=1)
            raw = raw / torch.where(norm == 0, 1.0, norm)
            length = torch.linalg.vector_norm(query.original.double(), dim=1)
            safe = torch.where(length == 0, 1.0, length * query.scale)
            self.logit = 1.0 / (safe * query.temperature)
        self.raw = raw.float()
        self.logit = self.logit.float()
        self.rank = torch.ones_like(targets)
        self.peak = torch.full_like(target, float("-inf"))
        self.mass = torch.zeros(target.shape[0], dtype=torch.float64, device=target.device)

    def run(self, excluded: Excluded) -> bool:
        """Scan all rows; False where some rows need the dense path."""
        total, height = self.table.rows.shape[0], self.scan.height
        buffer = torch.empty(height, self.target.shape[0], device=self.target.device)
        for start in range(0, total, height):
            stop = min(start + height, total)
            scores = buffer[: stop - start]
            error, doubtful = self.scan.score(start, stop, scores)
            if doubtful is not None:
                return False
            excluded.mask(start, stop, scores, float("-inf"))
            self._count(scores, error, start)
            self._add(scores)
        return bool(torch.isfinite(self.target).all())

    def _count(self, scores: torch.Tensor, error: torch.Tensor, start: int) -> None:
        ahead = (scores > self.raw + error).sum(0)
        reach = (scores >= self.raw - error).sum(0)
        self.rank += ahead
        close = (reach > ahead).nonzero()[:, 0]
        if not close.numel():
            return
        part = scores[:, close]
        near = (part >= (self.raw - error)[close]) & (part <= (self.raw + error)[close])
        row, column = near.nonzero(as_tuple=True)
        of, row = close[column], row + start
        query, rows = self.query, self.table.rows
        for piece in range(0, of.numel(), step := max(1, _PAIRS // rows.shape[1])):
            who, at = of[piece : piece + step], row[piece : piece + step]
            found = canonical_scores(
                query.original[who], rows[at][:, None], query.similarity, query.temperature
            )[:, 0]
            before = _before(self.table, at, self.targets[who])
            wins = (found > self.target[who]) | ((found == self.target[who]) & before)
            self.rank.index_add_(0, who, wins.long())

    def _add(self, scores: torch.Tensor) -> None:
        peak = torch.maximum(self.peak, scores.amax(0) * self.logit)
        safe = torch.where(torch.isinf(peak), 0.0, peak)
        self.mass *= torch.exp((self.peak - safe).double())
        self.mass += scores.mul_(self.logit).sub_(safe).exp_().sum(0)
        self.peak = peak

    def log_prob(self) -> torch.Tensor:
        """float32 [B]."""
        return (self.target - self.peak.double() - self.mass.log()).float()


def _dense_stats(
    table: Table,
    query: Queries,
    target: torch.Tensor,
    targets: torch.Tensor,
    excluded: Excluded,
    dense: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    own = excluded.pick(dense)
    rank = torch.ones_like(targets)
    mass = torch.full((targets.shape[0], 1), float("-inf"), device=target.device).double()
    for start in range(0, table.rows.shape[0], _DENSE_BLOCK):
        stop = min(start + _DENSE_BLOCK, table.rows.shape[0])
        scores = canonical_scores(
            query.original, table.rows[start:stop], query.similarity, query.temperature
        )
        at = torch.arange(start, stop, device=target.device)
        before = _before(table, at, targets[:, None])
        ahead = (scores > target[:, None]) | ((scores == target[:, None]) & before)
        own.mask(start, stop, ahead.T, False)
        own.mask(start, stop, scores.T, float("-inf"))
        rank += ahead.sum(1)
        mass = torch.logaddexp(mass, scores.double().logsumexp(1, keepdim=True))
    return rank, (target.double() - mass[:, 0]).float()


def _before(table: Table, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether the id of each row is lower than the target's."""
    return rows < targets if table.ids is None else table.ids[rows] < table.ids[targets]

"""The candidates of a search by torch operations: rows that may still be among the best k.

For every query up to ``pool_limit`` rows with the bounds score - error and score + error, and the
threshold t, the k-th largest lower bound seen:

    a block's group meets t where its maximum >= t - error;  its rows >= t - error enter;
    a full pool raises t to its own k-th largest lower bound and drops rows whose upper bound < t;
    one that stays full is given up to the dense path.

A block costs one read of its scores for the maxima, and work on the few rows that enter. Memory:
B * pool_limit rows with two bounds. Numerics: float32 bounds; ties survive, because comparisons
keep equality. Used where the C++ extension does not run (``_cpu.extension.Collector`` does the same
there).
"""

import torch

from ..._scan.blocks import entries_from, group_best


def pool_limit(k: int) -> int:
    """Candidates of a query beyond which it is given up to the dense path."""
    return 8 * k + 512


class Pool:
    """Rows that may still be among the best k of each query."""

    def __init__(self, batch: int, k: int, device: torch.device) -> None:
        self.k, self.capacity = k, pool_limit(k)
        shape = (batch, self.capacity)
        self.lower = torch.full(shape, float("-inf"), device=device)
        self.upper = torch.full(shape, float("-inf"), device=device)
        self.rows = torch.zeros(shape, dtype=torch.int64, device=device)
        self.fill = torch.zeros(batch, dtype=torch.int64, device=device)
        self.threshold = torch.full((batch,), float("-inf"), device=device)
        self.failed = torch.zeros(batch, dtype=torch.bool, device=device)
        self.fresh = True  # some threshold may still be -inf
        self.met = 0  # groups that met a threshold

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
        # Above -inf, so that masked rows never meet it.
        cut = (self.threshold - error).clamp_min(torch.finfo(torch.float32).min)
        met, group = (best >= cut).T.nonzero(as_tuple=True)
        if not met.numel():
            return
        self.met += met.numel()
        of, row, score = entries_from(scores, met, group, cut)
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

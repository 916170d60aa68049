"""item_topk over a plain table in plain torch: memory bounded, any device."""

import math
from functools import partial

import torch

from ..exclude import Exclude, normalize_exclude
from .bounds import HUGE, Queries, prepare_queries
from .engine import Excluded, certified_topk
from .plain import PlainTable

# Elements of a first-pass block of rows. On a CPU: rows that are read twice stay in its cache; rows
# that stream through are enough to hide the bookkeeping of a block.
_READ_TWICE = 1 << 21
_STREAMED = 1 << 22
_STREAMED_FEW = 1 << 24  # for a few queries: no reuse of rows at all
_FEW = 4
_DEVICE = 1 << 26


def block_rows(dim: int, batch: int, device: torch.device, read_twice: bool = False) -> int:
    """Rows of a first-pass block for ``batch`` queries."""
    if device.type != "cpu":
        elements = _DEVICE
    elif read_twice:
        elements = _READ_TWICE
    else:
        elements = _STREAMED_FEW if batch <= _FEW else _STREAMED
    return max(256, elements // (dim + 2 * batch))


class Float32Pass:
    """Float32 products of a table's rows, widened block by block where they are narrower."""

    name = "float32"

    def __init__(self, rows: torch.Tensor, norms: torch.Tensor | None, query: Queries) -> None:
        """rows: [N, d]; norms: float32 [N] of the rows, or None to take them on the way."""
        self.rows, self.norms, self.query = rows, norms, query
        batch = query.scaled.shape[0]
        self.height = block_rows(rows.shape[1], batch, rows.device, norms is None)
        self.operand = query.scaled.T.contiguous()
        self.error = None  # of every block, where the stored norms are all trusted
        if norms is not None and norms.numel():
            low, high = (float(edge) for edge in torch.aminmax(norms))
            if high <= HUGE and (low >= 1 / HUGE or query.similarity != "cosine"):
                self.error = query.product_error(self._norm_bound(high))

    def score(
        self, start: int, stop: int, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, query = self.rows[start:stop].float(), self.query
        torch.mm(rows, self.operand, out=out)
        if self.norms is None:
            norms = torch.linalg.vector_norm(rows, dim=1)
        else:
            norms = self.norms[start:stop]
        if query.similarity == "cosine":
            out.mul_(torch.where(norms > 0, norms.reciprocal(), 0.0)[:, None])
        elif query.similarity == "l2":
            out.sub_(0.5 * (norms * norms)[:, None])
        if self.error is not None:
            return self.error, None
        low, high = (float(edge) for edge in torch.aminmax(norms))
        trusted = norms <= HUGE
        if query.similarity == "cosine" and low < 1 / HUGE:
            trusted &= (norms >= 1 / HUGE) | (rows == 0).all(1)
        doubtful = None
        if not bool(trusted.all()):
            doubtful = (~trusted).nonzero()[:, 0]
            out[doubtful] = float("-inf")
            high = float(torch.where(trusted, norms, 0.0).max())
            doubtful = doubtful + start
        return query.product_error(self._norm_bound(high)), doubtful

    def _norm_bound(self, high: float) -> torch.Tensor:
        """An upper bound; squares below float32's normal range may be lost from a norm."""
        bound = high * 1.001 + math.sqrt(self.rows.shape[1]) * 2.0**-62
        return torch.tensor(bound, device=self.rows.device)


def item_topk(
    queries: torch.Tensor,
    items: torch.Tensor,
    k: int,
    similarity: str,
    temperature: float,
    exclude: Exclude,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores float32 [B, k], indices int64 [B, k]); padded with (-inf, -1)."""
    values, offsets = normalize_exclude(exclude, queries.shape[0], items.shape[0], items.device)
    query = prepare_queries(queries, similarity, temperature)
    scan = partial(Float32Pass, items, None)
    scores, ids, _ = certified_topk(PlainTable(items), scan, query, k, Excluded(values, offsets))
    return scores, ids

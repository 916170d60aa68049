"""item_topk over a plain table in plain torch: memory bounded, any device."""

import math

import torch

from ..exclude import Exclude, normalize_exclude
from .bounds import HUGE, Queries, prepare_queries
from .engine import Excluded, certified_topk

# Elements of a first-pass block: its rows and its scores stay in a CPU's cache.
_BLOCK_ELEMENTS = {"cpu": 1 << 21}
_BLOCK_ELEMENTS_DEVICE = 1 << 26


def block_rows(dim: int, batch: int, device: torch.device) -> int:
    """Rows of a first-pass block."""
    elements = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_DEVICE)
    return max(256, elements // (dim + 2 * batch))


class PlainTable:
    """A table [N, d] as the caller holds it; norms are taken on the way."""

    ids = None

    def __init__(self, items: torch.Tensor) -> None:
        self.rows = items

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]

    def block_rows(self, batch: int) -> int:
        return block_rows(self.rows.shape[1], batch, self.rows.device)

    def score_block(
        self, query: Queries, start: int, stop: int, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = self.rows[start:stop].float()
        norms = torch.linalg.vector_norm(rows, dim=1)
        return score_rows(query, rows, norms, start, out)


def score_rows(
    query: Queries, rows: torch.Tensor, norms: torch.Tensor, start: int, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A float32 first pass over rows [n, d] with float32 norms [n]: see ``Table.score_block``."""
    torch.mm(rows, query.scaled.T, out=out)
    low, high = (float(edge) for edge in torch.aminmax(norms))
    trusted = None
    if not high <= HUGE:
        trusted = norms <= HUGE
    if query.similarity == "cosine":
        if low < 1 / HUGE:
            settled = (norms >= 1 / HUGE) | (rows == 0).all(1)
            trusted = settled if trusted is None else trusted & settled
        inverse = torch.where(norms > 0, norms.reciprocal(), 0.0)
        out.mul_(inverse[:, None])
    elif query.similarity == "l2":
        out.sub_(0.5 * (norms * norms)[:, None])
    doubtful = None
    if trusted is not None and not bool(trusted.all()):
        doubtful = (~trusted).nonzero()[:, 0]
        out[doubtful] = float("-inf")
        high = float(torch.where(trusted, norms, 0.0).max())
        doubtful = doubtful + start
    # Squares below float32's normal range may be lost from the norm.
    bound = torch.tensor(high * 1.001 + math.sqrt(rows.shape[1]) * 2.0**-62, device=out.device)
    return query.product_error(bound), doubtful


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
    scores, ids, _ = certified_topk(
        PlainTable(items),
        prepare_queries(queries, similarity, temperature),
        k,
        Excluded(values, offsets),
    )
    return scores, ids

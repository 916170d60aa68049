"""item_topk over a plain table in plain torch: memory bounded, any device."""

import math
from functools import partial

import torch

from ..exclude import Exclude, normalize_exclude
from .bounds import HUGE, Queries, prepare_queries
from .engine import Excluded, certified_topk
from .plain import PlainTable

# Elements of a first-pass block: its rows and its scores stay in a CPU's cache.
_BLOCK_ELEMENTS = {"cpu": 1 << 21}
_BLOCK_ELEMENTS_DEVICE = 1 << 26


def block_rows(dim: int, batch: int, device: torch.device) -> int:
    """Rows of a first-pass block."""
    elements = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_DEVICE)
    return max(256, elements // (dim + 2 * batch))


class Float32Pass:
    """Float32 products of a table's rows, widened block by block where they are narrower."""

    name = "float32"

    def __init__(self, rows: torch.Tensor, norms: torch.Tensor | None, query: Queries) -> None:
        """rows: [N, d]; norms: float32 [N] of the rows, or None to take them on the way."""
        self.rows, self.norms, self.query = rows, norms, query
        self.height = block_rows(rows.shape[1], query.scaled.shape[0], rows.device)
        self.operand = query.scaled.T.contiguous()

    def score(
        self, start: int, stop: int, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, query = self.rows[start:stop].float(), self.query
        torch.mm(rows, self.operand, out=out)
        if self.norms is None:
            norms = torch.linalg.vector_norm(rows, dim=1)
        else:
            norms = self.norms[start:stop]
        low, high = (float(edge) for edge in torch.aminmax(norms))
        trusted = norms <= HUGE
        if query.similarity == "cosine":
            if low < 1 / HUGE:
                trusted &= (norms >= 1 / HUGE) | (rows == 0).all(1)
            out.mul_(torch.where(norms > 0, norms.reciprocal(), 0.0)[:, None])
        elif query.similarity == "l2":
            out.sub_(0.5 * (norms * norms)[:, None])
        doubtful = None
        if not bool(trusted.all()):
            doubtful = (~trusted).nonzero()[:, 0]
            out[doubtful] = float("-inf")
            high = float(torch.where(trusted, norms, 0.0).max())
            doubtful = doubtful + start
        # Squares below float32's normal range may be lost from the norm.
        high = high * 1.001 + math.sqrt(rows.shape[1]) * 2.0**-62
        return query.product_error(torch.tensor(high, device=out.device)), doubtful


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

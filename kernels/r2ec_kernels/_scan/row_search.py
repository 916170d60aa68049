"""A top-K search of float32 rows on a CPU in a handful of calls: what small catalogs want.

The certified search (``topk.impl.common``) spends 0.2 ms of a call on array operations around its
products, as much as the products of 10,000 rows with 16 queries take. Here compiled code bounds
errors, collects and scores candidates (``kernels/csrc/row_search.hpp``); a matrix library makes the
products where there are more than a few queries. Results are the same, bit for bit. It gives up
rather than search in another way: numbers outside float32's safe range, large k, mass ties.

Bytes: one read of the rows (twice where their norms are not known), and of [block, B] products.
FLOPs: 2 B N d in float32, 4 d in float64 for each candidate.
"""

from typing import Any, NamedTuple

import torch

from .._cpu import extension
from .._exact.bounds import narrow_products
from .blocks import CACHED, DENSE_SHARE, visiting_order

_PRODUCTS, _PRODUCT_ROWS = 1 << 20, 1 << 14  # of a block, which stays in a core's cache


class Found(NamedTuple):
    """scores float32 [B, k] and ids int64 [B, k]; how many rows were scored exactly, and how many
    scores met a threshold."""

    scores: torch.Tensor
    ids: torch.Tensor
    candidates: int
    met: int


def can_search(rows: torch.Tensor, queries: torch.Tensor, k: int) -> bool:
    """Whether ``search`` may be asked: for k of rows [N, d], for queries [B, d]."""
    fits = extension.reads(rows) and queries.dtype == torch.float32 and len(queries) > 0
    return fits and 0 < DENSE_SHARE * k <= len(rows) and not narrow_products(rows.device)


def search(
    rows: torch.Tensor,
    queries: torch.Tensor,
    k: int,
    *,
    similarity: str,
    temperature: float,
    limit: int,
    norms: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    excluded: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> Found | None:
    """The k best rows of each query, or None where it takes another search to tell.

    Args:
        rows: [N, d]; queries: [B, d]; both as ``can_search`` wants them.
        limit: candidates of a query beyond which this gives up.
        norms: float32 [N] of the rows, or None to take them on the way.
        ids: int64 [N], the id of each row; None: its position.
        excluded, offsets: row positions int64 [E] (-1 for none) and [B + 1], of each query.
    """
    settings = similarity, temperature, k, limit
    run = extension.row_search(rows, queries, *settings, excluded, offsets)
    if not run.bounded:
        return None
    if extension.fits(rows, len(queries)):
        bounded = run.scan()
    else:
        bounded = _add_products(run, rows, queries, norms)
    found = run.finish(None if ids is None else ids.numpy()) if bounded else None
    if found is None:
        return None
    scores, best, candidates, met = found
    return Found(torch.from_numpy(scores), torch.from_numpy(best), candidates, met)


def _add_products(
    run: Any, rows: torch.Tensor, queries: torch.Tensor, norms: torch.Tensor | None
) -> bool:
    """Offer the scores of all rows, block by block; False where one has no bound."""
    operand = queries.T.contiguous()
    wide = len(queries) + (rows.shape[1] if norms is None and rows.numel() > CACHED else 0)
    height = min(_PRODUCT_ROWS, max(256, _PRODUCTS // wide), len(rows))
    buffer = queries.new_empty(height, len(queries))
    for start, stop in visiting_order(len(rows), height):
        block = rows[start:stop]
        products = torch.mm(block, operand, out=buffer[: stop - start])
        own = torch.linalg.vector_norm(block, dim=1) if norms is None else norms[start:stop]
        if not run.add(products.numpy(), start, own.numpy()):
            return False
    return True

"""The canonical score and the canonical order: the one definition of "exact" in this package.

The canonical score of a query and an item is their similarity in float64, divided by the
temperature and rounded once to float32. Sums run in one fixed order (``halving_sum``), so that a
score depends on its query and its row alone: not on batch size, block size, thread count or device.

Matrix products add in another order. They are used all the same, with their error bound: where
both ends of the bound round to the same float32 number, that number is the canonical score; the
few scores that stay ambiguous are summed in the fixed order.

Numbers that are not finite have one meaning in every implementation. +inf and -inf are scores like
any other, ties by the lower id. NaN means "cannot be compared": its order key is that of no item,
so such an item is never returned, and it neither ranks nor weighs beside a target. A NaN or an
infinity in a query or a row, products that leave float32, and (cosine) any infinite vector lead
there by the rules of floating-point arithmetic, which no order of summing changes.
"""

import torch

from .._checks import MAX_ITEMS
from .._dispatch import is_capturing

PADDING_KEY = -(2**63)  # the order key of "no item": below every item's key

_UNIT = 2.0**-53  # rounding unit of float64
_BLOCK = 1 << 20  # elements of a float64 temporary


def canonical_scores(
    queries: torch.Tensor, rows: torch.Tensor, similarity: str, temperature: float
) -> torch.Tensor:
    """Canonical scores, float32 [B, C].

    Args:
        queries: [B, d], any floating type.
        rows: [C, d], scored for every query, or [B, C, d], each query's own rows.
        similarity: "dot"; "cosine" (a zero norm scores 0); "l2" (minus the unsquared distance).
        temperature: positive; the similarity is divided by it.

    Memory: the result and float64 temporaries of bounded size.
    """
    batch, d = queries.shape
    count = rows.shape[-2]
    out = torch.empty(batch, count, dtype=torch.float32, device=queries.device)
    if rows.dim() == 3:
        step = max(1, _BLOCK // max(1, count * d))
        for start in range(0, batch, step):
            stop = min(batch, start + step)
            out[start:stop] = _scores(
                queries[start:stop], rows[start:stop], similarity, temperature
            )
        return out
    step = max(1, _BLOCK // max(1, d + batch))
    for start in range(0, count, step):
        stop = min(count, start + step)
        out[:, start:stop] = _scores(queries, rows[start:stop], similarity, temperature)
    return out


def pair_scores(
    queries: torch.Tensor,
    rows: torch.Tensor,
    of: torch.Tensor,
    at: torch.Tensor,
    similarity: str,
    temperature: float,
) -> torch.Tensor:
    """Canonical scores, float32 [M], of the pairs (query ``of``, row ``at``), int64 [M].

    Memory: the result and temporaries of bounded size.
    """
    out = torch.empty(of.shape, dtype=torch.float32, device=queries.device)
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    for start in range(0, of.numel(), step):
        part = slice(start, start + step)
        own = rows[at[part]][:, None]
        out[part] = _scores(queries[of[part]], own, similarity, temperature)[:, 0]
    return out


def order_keys(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Unique int64 keys whose descending order is (score descending, id ascending).

    Args:
        scores: float32, without -0.0; NaN gives ``PADDING_KEY``.
        ids: int64 in 0..MAX_ITEMS-1, broadcastable to ``scores``.
    """
    bits = scores.view(torch.int32).to(torch.int64)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = bits * 2**32 + (MAX_ITEMS - ids)
    return torch.where(scores.isnan(), PADDING_KEY, keys)


def from_order_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores float32, ids int64) of keys; ``PADDING_KEY`` gives (-inf, -1)."""
    bits = keys >> 32
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int32)
    ids = MAX_ITEMS - (keys & 0xFFFFFFFF)
    empty = keys == PADDING_KEY
    return (
        bits.view(torch.float32).masked_fill(empty, float("-inf")),
        ids.masked_fill(empty, -1),
    )


def _scores(
    queries: torch.Tensor, rows: torch.Tensor, similarity: str, temperature: float
) -> torch.Tensor:
    """One block of canonical scores: a product with its error bound, then the ambiguous ones."""
    query, row = queries.double(), rows.double()
    if is_capturing(row.device):  # no decision that the host would have to wait for
        return _defining_scores(query[:, None], row, similarity, temperature).add_(0.0)
    dot = torch.bmm(row, query.unsqueeze(2)).squeeze(2) if row.dim() == 3 else query @ row.T
    query_norm = torch.linalg.vector_norm(query, dim=-1).unsqueeze(-1)
    row_norm = torch.linalg.vector_norm(row, dim=-1)
    # Two summation orders of d products differ by at most 2 d u sum|q x| <= 2 d u |q| |x|.
    unit = 2.5 * (query.shape[1] + 4) * _UNIT
    if similarity == "l2":
        square = query_norm**2 + row_norm**2 - 2 * dot
        error = unit * (query_norm + row_norm) ** 2
        low = -((square + error).clamp_min(0).sqrt()) / temperature
        high = -((square - error).clamp_min(0).sqrt()) / temperature
    else:
        scale = query_norm * row_norm
        error = unit * scale
        if similarity == "cosine":
            zero = scale == 0
            dot = torch.where(zero, 0.0, dot / scale)
            error = torch.where(zero, 0.0, 2 * unit)
        low, high = (dot - error) / temperature, (dot + error) / temperature
    low, high = low.float(), high.float()
    ambiguous = low != high
    if bool(ambiguous.any()):
        i_query, i_row = ambiguous.nonzero(as_tuple=True)
        step = max(1, _BLOCK // query.shape[1])
        for start in range(0, i_query.numel(), step):
            own, other = i_query[start : start + step], i_row[start : start + step]
            picked = row[own, other] if row.dim() == 3 else row[other]
            low[own, other] = _defining_scores(query[own], picked, similarity, temperature)
    return low.add_(0.0)  # -0.0 becomes 0.0


def _defining_scores(
    query: torch.Tensor, row: torch.Tensor, similarity: str, temperature: float
) -> torch.Tensor:
    """The definition: float64 query [..., d] and row [..., d] -> float32 [...]."""
    if similarity == "l2":
        value = -halving_sum((query - row).square_()).sqrt()
    else:
        value = halving_sum(query * row)
        if similarity == "cosine":
            scale = halving_sum(query * query).sqrt() * halving_sum(row * row).sqrt()
            value = torch.where(scale == 0, 0.0, value / scale)
    return (value / temperature).float()


def halving_sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum float64 terms [..., d] -> [...], always in the same order; overwrites ``terms``.

    The upper half is added to the lower half until one column is left (the middle one of an odd
    width waits), so the order depends on d alone.
    """
    width = terms.shape[-1]
    while width > 1:
        half = width // 2
        terms[..., :half] += terms[..., width - half : width]
        width -= half
    return terms[..., 0]

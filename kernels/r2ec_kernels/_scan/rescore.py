"""Exact re-score: canonical scores of the few rows that a coarse scan leaves.

For pairs (query, row) the canonical score (``_exact.scores``): float64 over d columns, rounded once
to float32. It gathers M d elements, 2 M d float64 FLOPs, in pieces of bounded size. The C++
extension and torch give the same bits.
"""

import torch

from .._cpu import extension
from .._exact import scores as exact
from .._exact.bounds import Queries
from .._exact.scores import PADDING_KEY, order_keys
from .._exact.table import Table


def pair_scores(table: Table, query: Queries, of: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Canonical scores, float32 [M], of the pairs (query ``of``, row ``at``), int64 [M]: by the C++
    extension where it can read the table, else by torch, bit for bit the same."""
    given = query.original, table.rows, of, at, query.similarity, query.temperature
    run = extension.pair_scores if extension.reads(table.rows) else exact.pair_scores
    return run(*given)


def best_keys(table: Table, query: Queries, rows: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest order keys [B, k] of candidate rows [B, C] (-1: none) by canonical score."""
    if extension.reads(table.rows):
        return extension.best_keys(query, table.rows, table.ids, rows, k)
    of, place = (rows >= 0).nonzero(as_tuple=True)
    at = rows[of, place]
    scores = pair_scores(table, query, of, at)
    keys = torch.full((len(rows), max(k, rows.shape[1])), PADDING_KEY, device=rows.device)
    keys[of, place] = order_keys(scores, table.ids_of(at))
    return keys.topk(k, dim=1).values

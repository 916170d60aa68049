"""target_stats as its definition: every canonical score, sorted. Materialises [B, N]."""

import math

import torch

from ..._exact.included import as_mask
from ..._exact.scores import canonical_scores


def target_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    exclude_values: torch.Tensor,
    exclude_offsets: torch.Tensor,
    include: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank in a stable sort of canonical scores; log-softmax in float64 over the same items.

    Scores that are NaN come last in the sort and have no share of the softmax.

    target_rows: [B, d], the targets' rows where some are no items: a target at -1 stands before all
    items, one at N behind them.
    """
    if target_rows is not None:
        return _foreign_stats(
            queries,
            items,
            targets,
            similarity,
            temperature,
            exclude_values,
            exclude_offsets,
            include,
            target_rows,
        )
    scores = canonical_scores(queries, items, similarity, temperature)
    count = items.shape[0]
    included = torch.ones(count, dtype=torch.bool, device=items.device)
    if include is not None:
        included = as_mask(include, count)
    ranks, log_probs = [], []
    for b in range(queries.shape[0]):
        target = float(scores[b, targets[b]])
        hidden = exclude_values[exclude_offsets[b] : exclude_offsets[b + 1]]
        competes = included.clone()
        competes[hidden] = False
        competes[targets[b]] = True
        if math.isnan(target):
            ranks.append(int(competes.sum()))
            log_probs.append(-math.inf)
            continue
        competes &= ~scores[b].isnan()
        place = int(competes[: targets[b]].sum())  # of the target among those that compete
        row = scores[b][competes].double()
        order = torch.sort(row, descending=True, stable=True).indices
        ranks.append(int((order == place).nonzero()[0, 0]) + 1)
        best = row.max()
        if torch.isinf(best):  # the items at the top share everything
            log_probs.append(-math.log(int((row == best).sum())) if target == best else -math.inf)
        else:
            log_probs.append(float(torch.log_softmax(row, 0)[place]))
    rank = torch.tensor(ranks, dtype=torch.int64, device=queries.device)
    return rank, torch.tensor(log_probs, dtype=torch.float32, device=queries.device)


def _foreign_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    exclude_values: torch.Tensor,
    exclude_offsets: torch.Tensor,
    include: torch.Tensor | None,
    target_rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same query by query, with a target that is no item put before the items or behind."""
    count = items.shape[0]
    mask = torch.ones(count, dtype=torch.bool, device=items.device)
    if include is not None:
        mask = as_mask(include, count)
    present = mask.new_ones(1)
    ranks, log_probs = torch.empty_like(targets), torch.empty(len(targets), device=items.device)
    for b, at in enumerate(targets.tolist()):
        one = slice(b, b + 1)
        hidden = exclude_values[exclude_offsets[b] : exclude_offsets[b + 1]]
        rows, listed, place = items, mask, at
        if at < 0:
            rows, listed = torch.cat([target_rows[one], items]), torch.cat([present, mask])
            hidden, place = hidden + 1, 0
        elif at >= count:
            rows, listed = torch.cat([items, target_rows[one]]), torch.cat([mask, present])
        ranks[one], log_probs[one] = target_stats(
            queries[one],
            rows,
            targets.new_tensor([place]),
            similarity,
            temperature,
            hidden,
            hidden.new_tensor([0, hidden.numel()]),
            listed,
        )
    return ranks, log_probs

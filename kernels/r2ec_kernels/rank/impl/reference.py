"""target_stats as its definition: every canonical score, sorted. Materialises [B, N]."""

import torch

from ..._exact.scores import canonical_scores


def target_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    exclude_values: torch.Tensor,
    exclude_offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank in a stable sort of canonical scores; log-softmax in float64 over the same items."""
    scores = canonical_scores(queries, items, similarity, temperature)
    ranks, log_probs = [], []
    for b in range(queries.shape[0]):
        row = scores[b].double()
        hidden = exclude_values[exclude_offsets[b] : exclude_offsets[b + 1]]
        hidden = hidden[hidden != targets[b]]
        row[hidden] = -torch.inf
        order = torch.sort(row, descending=True, stable=True).indices
        ranks.append(int((order == targets[b]).nonzero()[0, 0]) + 1)
        log_probs.append(torch.log_softmax(row, 0)[targets[b]])
    rank = torch.tensor(ranks, dtype=torch.int64, device=queries.device)
    if not log_probs:
        return rank, torch.empty(0, device=queries.device)
    return rank, torch.stack(log_probs).float()

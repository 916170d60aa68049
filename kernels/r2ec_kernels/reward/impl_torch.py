"""The reward room in plain torch: one pass over the items in blocks, any device."""

import torch

from ..canonical import canonical_scores
from ..exclude import exclude_rows

BLOCK_SCORES = 1 << 20  # scores of one block: 4 MiB in float32
BLOCK_BYTES = 8 << 20  # item rows of one block
MIN_BLOCK = 512  # item rows of one block, at least


def recpo_reward(
    rank: torch.Tensor, log_prob: torch.Tensor, softmax_weight: float, ndcg_k: int
) -> torch.Tensor:
    gain = torch.where(rank <= ndcg_k, torch.log2(rank.double() + 1).reciprocal(), 0.0)
    return softmax_weight * log_prob.double().exp() + (1 - softmax_weight) * gain


def grouped_advantage(
    rewards: torch.Tensor, estimator: str, best: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages (float64) and best trajectories of [B, G] rewards."""
    group = rewards.shape[1]
    values = rewards.double()
    order = torch.sort(values, dim=1, descending=True, stable=True).indices
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order[:, :best], True)
    if group == 1:
        return torch.ones_like(values), chosen
    centred = values - values.mean(1, keepdim=True)
    if estimator == "grpo":
        variance = centred.square().sum(1, keepdim=True) / (group - 1)
        advantages = centred / (variance.sqrt() + 1e-8)
    else:
        advantages = centred * (group / (group - 1))
    tied = values.amax(1, keepdim=True) == values.amin(1, keepdim=True)
    return advantages.masked_fill(tied, 0.0), chosen


def target_stats(
    queries: torch.Tensor,
    items: torch.Tensor,
    targets: torch.Tensor,
    similarity: str,
    temperature: float,
    exclude_values: torch.Tensor,
    exclude_offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) from canonical scores, block by block."""
    batch = queries.shape[0]
    own = items[targets][:, None]
    target = canonical_scores(queries, own, similarity, temperature)  # [B, 1]
    rows = exclude_rows(exclude_offsets, exclude_values.numel())
    kept = exclude_values != targets[rows]
    rows, columns = rows[kept], exclude_values[kept]
    rank = torch.ones(batch, dtype=torch.int64, device=queries.device)
    lse = torch.full((batch, 1), -torch.inf, dtype=torch.float64, device=queries.device)
    width = _block_rows(batch, items)
    for start in range(0, items.shape[0], width):
        block = items[start : start + width]
        scores = canonical_scores(queries, block, similarity, temperature)
        here = (columns >= start) & (columns < start + block.shape[0])
        scores[rows[here], columns[here] - start] = -torch.inf
        ids = torch.arange(start, start + block.shape[0], device=queries.device)
        ahead = (scores > target) | ((scores == target) & (ids < targets[:, None]))
        # an excluded item never counts, even where the target itself scores -inf
        ahead[rows[here], columns[here] - start] = False
        rank += ahead.sum(1)
        lse = torch.logaddexp(lse, scores.double().logsumexp(1, keepdim=True))
    return rank, (target.double() - lse)[:, 0].float()


def _block_rows(batch: int, items: torch.Tensor) -> int:
    by_scores = BLOCK_SCORES // max(batch, 1)
    by_bytes = BLOCK_BYTES // max(items.shape[1] * items.element_size(), 1)
    return max(MIN_BLOCK, min(by_scores, by_bytes))

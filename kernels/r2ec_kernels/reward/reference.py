"""The equations of the reward room in plain torch: they materialise everything."""

import torch

from ..canonical import canonical_scores


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


def recpo_reward(
    rank: torch.Tensor, log_prob: torch.Tensor, softmax_weight: float, ndcg_k: int
) -> torch.Tensor:
    """docs/method.md#reward: R = b R_c + (1 - b) R_d, in float64."""
    gain = torch.where(rank <= ndcg_k, 1 / torch.log2(rank.double() + 1), 0.0)
    return softmax_weight * log_prob.double().exp() + (1 - softmax_weight) * gain


def grouped_advantage(
    rewards: torch.Tensor, estimator: str, best: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages (float64) and the best trajectories of each group."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64, device=rewards.device)
    chosen = torch.zeros(rewards.shape, dtype=torch.bool, device=rewards.device)
    group = rewards.shape[1]
    for b in range(rewards.shape[0]):
        row = rewards[b].double()
        if group == 1:
            advantages[b] = 1.0
        elif row.max() != row.min():
            for i in range(group):
                if estimator == "grpo":
                    advantages[b, i] = (row[i] - row.mean()) / (row.std(unbiased=True) + 1e-8)
                else:
                    others = torch.cat([row[:i], row[i + 1 :]])
                    advantages[b, i] = row[i] - others.mean()
        chosen[b, torch.sort(row, descending=True, stable=True).indices[:best]] = True
    return advantages, chosen

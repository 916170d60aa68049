"""Run with TRITON_INTERPRET=1: the reward kernels against a stable sort and the plain functions."""

import sys

import torch

from r2ec_kernels import grouped_advantage, recpo_reward, reward_and_advantage, target_stats
from r2ec_kernels.rank.impl import triton as rank_triton


def table(kind, count, d, generator):
    items = torch.randn(count, d, generator=generator)
    if kind == "ties":
        items = items.round()
    elif kind == "copies":
        items = items[torch.randint(0, max(count // 5, 1), (count,), generator=generator)]
    elif kind == "scales":
        items *= torch.exp2(torch.randint(-10, 11, (count, 1), generator=generator))
    elif kind == "equal":
        items[:] = items[0]
    return items


def main():
    rank_triton.BLOCK_ITEMS, rank_triton.BLOCK_QUERIES = 32, 16
    rank_triton.PROGRAMS = 3  # several tiles a split, several splits
    cases = 0
    for kind in ("normal", "ties", "copies", "scales", "equal"):
        for seed, (count, d, batch) in enumerate([(1, 3, 1), (63, 20, 5), (150, 33, 17)]):
            generator = torch.Generator().manual_seed(seed)
            items = table(kind, count, d, generator)
            queries = torch.randn(batch, d, generator=generator)
            queries = queries.round() if kind == "ties" else queries
            targets = torch.randint(0, count, (batch,), generator=generator)
            exclude = torch.randint(-1, count, (batch, 6), generator=generator)
            exclude[:, 0] = targets
            for similarity in ("dot", "cosine"):
                arguments = {"similarity": similarity, "temperature": 0.5, "exclude": exclude}
                rank, log_prob = target_stats(queries, items, targets, impl="triton", **arguments)
                right = target_stats(queries, items, targets, impl="reference", **arguments)
                assert torch.equal(rank, right.rank), (kind, count, similarity)
                torch.testing.assert_close(log_prob, right.log_prob, rtol=1e-5, atol=1e-4)
                cases += 1
    for group in (1, 2, 5):
        generator = torch.Generator().manual_seed(group)
        rank = torch.randint(1, 1500, (7, group), generator=generator)
        log_prob = -5 * torch.rand(7, group, generator=generator)
        rank[0], log_prob[0] = 7, -1.0
        for estimator in ("grpo", "rloo"):
            ours = reward_and_advantage(rank, log_prob, estimator=estimator, impl="triton")
            rewards = recpo_reward(rank, log_prob)
            advantages, best = grouped_advantage(rewards, estimator=estimator)
            torch.testing.assert_close(ours.rewards, rewards, rtol=3e-7, atol=0)
            torch.testing.assert_close(ours.advantages, advantages, rtol=1e-4, atol=1e-6)
            assert torch.equal(ours.best, best)
            cases += 1
    sys.stdout.write(f"cases {cases}\n")


if __name__ == "__main__":
    main()

"""Ranks and log-probabilities over a table in parts, in one process."""

import itertools

import torch

from r2ec_kernels._exact.excluded import exclude_part
from r2ec_kernels._exact.included import include_part
from r2ec_kernels.rank.api import run_target_stats
from r2ec_kernels.rank.sharded import merged_log_prob


def part_stats(queries, items, targets, edges, impl, similarity, temperature, exclude, include):
    """Rank and log-probability in each part [parts, B], and those of the whole."""
    parts = []
    for first, last in itertools.pairwise(edges):
        count = last - first
        parts.append(
            run_target_stats(
                queries,
                items[first:last],
                (targets - first).clamp(-1, count),
                similarity,
                temperature,
                exclude_part(exclude, first, count),
                include_part(include, first, count),
                impl,
                items[targets],
            )
        )
    ranks, log_probs = (torch.stack(found) for found in zip(*parts, strict=True))
    whole = 1 + (ranks - 1).sum(0), merged_log_prob(log_probs.double())
    return ranks, log_probs, whole

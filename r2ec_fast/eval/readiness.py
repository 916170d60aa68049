"""What the figures of `eval.reasoning` mean for RecPO: is there anything to choose from?

RecPO raises the probability of the better reasonings of a group. That teaches something only where
reasonings come to an end, where the item head reads them, and where some are better than others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from r2ec_fast.eval.metrics import STDERR

DIFFERENCE = "own_minus_swapped_ndcg@10"

MOST_CLIPPED = 0.5
"""Above it most read-outs, and so most rewards, are those of texts that were broken off: what a
reasoning would have come to, nobody pays for."""

STANDARD_ERRORS = 2.0
"""A difference is taken for more than chance from this many standard errors on: about 95 %."""

LEAST_REWARD_STD = 0.01
"""The best of 4 to 16 normal draws lies 1.0 to 1.8 standard deviations above their mean. So below
this, perfect choice within every group would gain less than about 0.02 of a reward between 0 and
1, which is what the ndcg@10 of several hundred examples is uncertain by."""

LEAST_BEST_BEATS_DIRECT = 0.05
"""Of examples whose target direct mode does not rank first already. Below it a step of 24 users
(the paper's) has about one group that holds a reasoning worth having. Chance alone gives far more:
where a reasoning only shifts the ranks at random, the best of 4 is ahead in 4 groups of 5."""


def concerns(figures: Mapping[str, float]) -> list[str]:
    """Why RecPO would have nothing to choose from, a sentence each; none: nothing speaks against
    it. ``figures`` are those of :meth:`~r2ec_fast.eval.reasoning.ReasoningRanks.figures`."""
    found = []
    if figures["clipped_ratio"] > MOST_CLIPPED:
        found.append(
            f"{figures['clipped_ratio']:.0%} of the reasonings are cut at max_completion_length "
            "before they end"
        )
    own, spread = figures.get(DIFFERENCE, math.nan), figures["reward_std"]
    error = figures.get(f"{DIFFERENCE}{STDERR}", math.nan)
    if not math.isnan(error) and (
        own <= 0 or (own <= STANDARD_ERRORS * error and spread < LEAST_REWARD_STD)
    ):
        found.append(
            "the item head does not seem to read what a reasoning says of its user: with another "
            f"user's it ranks as well (own - swapped {_signed(figures, DIFFERENCE)} ndcg@10; the "
            f"rewards of a group have a standard deviation of {spread:.2g})"
        )
    beats, open_ = figures["best_beats_direct"], 1 - figures["direct_hit_rate@1"]
    if beats < LEAST_BEST_BEATS_DIRECT * open_:
        found.append(
            f"in only {beats:.0%} of the groups does the best of {_group(figures)} reasonings rank "
            "the target better than direct mode does"
        )
    return found


def advice(found: list[str]) -> str:
    """One text of :func:`concerns`, with what can be done about them."""
    return (
        f"RecPO has little to choose from: {'; '.join(found)}. What helps: first train the model "
        'to write reasonings, objective="reasoning_sft"; let them end, a longer '
        "max_completion_length; let them differ, a higher temperature (docs/guides/training.md, "
        '"Is there anything to choose from?")'
    )


def summary(figures: Mapping[str, float]) -> str:
    """The figures in one line."""
    swapped = f", own - swapped {_signed(figures, DIFFERENCE)}" if DIFFERENCE in figures else ""
    return (
        f"reasonings of {figures['examples']:.0f} examples: {figures['ended_ratio']:.0%} end, "
        f"{figures['mean_length']:.1f} tokens, reward {figures['reward']:.3f} with a standard "
        f"deviation of {figures['reward_std']:.3f} in a group; ndcg@10: reasoned - direct "
        f"{_signed(figures, 'reasoned_minus_direct_ndcg@10')}{swapped}; the best of "
        f"{_group(figures)} beats direct mode in {figures['best_beats_direct']:.0%}"
    )


def readiness_table(figures: Mapping[str, float]) -> str:
    """The figures as a Markdown table, one a line."""
    group = _group(figures)
    rows = {
        "examples": f"{figures['examples']:.0f}",
        "reasonings that end with the marker": f"{figures['ended_ratio']:.1%}",
        "cut at max_completion_length": f"{figures['clipped_ratio']:.1%}",
        "tokens of a reasoning": f"{figures['mean_length']:.1f}",
        "reward": f"{figures['reward']:.4f}",
        f"its standard deviation within a group of {group}": f"{figures['reward_std']:.4f}",
        "groups whose rewards all tie": f"{figures['frac_reward_zero_std']:.1%}",
        "direct, ndcg@10": f"{figures['direct_ndcg@10']:.4f}",
        "reasoned (greedy), ndcg@10": f"{figures['reasoned_ndcg@10']:.4f}",
        "reasoned - direct, ndcg@10": _signed(figures, "reasoned_minus_direct_ndcg@10"),
        "own - swapped reasoning, ndcg@10": _signed(figures, DIFFERENCE),
        f"best of {group} beats direct": f"{figures['best_beats_direct']:.1%}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| figure | value |", "|---|---:|", *lines])


def _group(figures: Mapping[str, float]) -> str:
    return f"{figures['num_generations']:.0f}"


def _signed(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return "–"
    error = figures[f"{name}{STDERR}"]
    return f"{figures[name]:+.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")

"""When the figures say that RecPO has nothing to choose from, and how they are told."""

from __future__ import annotations

import math

import pytest

from r2ec_fast.eval.readiness import advice, concerns, readiness_table, summary

GOOD = {
    "examples": 64.0,
    "direct_hit_rate@1": 0.25,
    "direct_ndcg@10": 0.1,
    "reasoned_ndcg@10": 0.3,
    "reasoned_minus_direct_ndcg@10": 0.2,
    "reasoned_minus_direct_ndcg@10/se": 0.03,
    "own_minus_swapped_ndcg@10": 0.25,
    "own_minus_swapped_ndcg@10/se": 0.04,
    "num_generations": 4.0,
    "ended_ratio": 0.875,
    "clipped_ratio": 0.0625,
    "mean_length": 18.25,
    "reward": 0.3,
    "reward_std": 0.15,
    "frac_reward_zero_std": 0.125,
    "best_beats_direct": 0.5,
}


def test_nothing_speaks_against_good_figures():
    assert concerns(GOOD) == []


@pytest.mark.parametrize(("clipped", "found"), [(0.5, 0), (0.51, 1), (1.0, 1)])
def test_most_reasonings_are_cut(clipped, found):
    texts = concerns(GOOD | {"clipped_ratio": clipped})
    assert len(texts) == found
    if found:
        assert f"{clipped:.0%} of the reasonings are cut at max_completion_length" in texts[0]


@pytest.mark.parametrize(
    ("own", "error", "spread", "found"),
    [
        (0.0, 0.0, 0.0, 1),  # the item head ignores the reasoning altogether
        (0.05, 0.03, 0.009, 1),
        (-0.2, 0.03, 0.009, 1),
        (0.07, 0.03, 0.009, 0),  # the swap is felt
        (0.05, 0.03, 0.011, 0),  # the rewards differ
        (0.0, 0.03, 0.2, 1),  # they differ, but not by what the reasoning says of its user
        (-0.006, 0.005, 0.035, 1),
        (0.001, 0.005, 0.035, 0),
        (0.0, math.nan, 0.0, 0),  # one user: no error to judge by
    ],
)
def test_the_item_head_does_not_read(own, error, spread, found):
    change = {
        "own_minus_swapped_ndcg@10": own,
        "own_minus_swapped_ndcg@10/se": error,
        "reward_std": spread,
    }
    texts = concerns(GOOD | change)
    assert len(texts) == found
    if found:
        assert f"(own - swapped {own:+.4f} ± {error:.4f} ndcg@10;" in texts[0]
        assert f"a standard deviation of {spread:.2g})" in texts[0]


@pytest.mark.parametrize(
    ("beats", "first", "found"),
    [(0.04, 0.0, 1), (0.05, 0.0, 0), (0.04, 0.25, 0), (0.03, 0.25, 1), (0.0, 1.0, 0)],
)
def test_the_best_of_a_group_hardly_beats_direct_mode(beats, first, found):
    texts = concerns(GOOD | {"best_beats_direct": beats, "direct_hit_rate@1": first})
    assert len(texts) == found
    if found:
        assert f"in only {beats:.0%} of the groups does the best of 4 reasonings" in texts[0]


def test_the_advice_names_settings():
    bad = GOOD | {"clipped_ratio": 1.0, "best_beats_direct": 0.0}
    text = advice(concerns(bad))
    assert text.startswith("RecPO has little to choose from: 100% of the reasonings are cut")
    for word in ('objective="reasoning_sft"', "max_completion_length", "temperature"):
        assert word in text


def test_figures_in_a_line_and_in_a_table():
    line = summary(GOOD)
    assert "\n" not in line
    assert "64 examples: 88% end, 18.2 tokens, reward 0.300" in line
    assert "reasoned - direct +0.2000 ± 0.0300, own - swapped +0.2500 ± 0.0400" in line
    assert line.endswith("the best of 4 beats direct mode in 50%")
    rows = readiness_table(GOOD).split("\n")
    assert rows[:2] == ["| figure | value |", "|---|---:|"]
    assert "| own - swapped reasoning, ndcg@10 | +0.2500 ± 0.0400 |" in rows
    assert "| best of 4 beats direct | 50.0% |" in rows
    assert len(rows) == 14


def test_a_swap_that_was_not_possible_is_left_out():
    figures = {k: v for k, v in GOOD.items() if not k.startswith("own_minus_swapped")}
    assert concerns(figures | {"reward_std": 0.0}) == []
    assert "swapped" not in summary(figures)
    assert "| own - swapped reasoning, ndcg@10 | – |" in readiness_table(figures)

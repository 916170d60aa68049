"""The correction for a sampler with other numerics, in each of its four modes, by hand."""

import dataclasses
import math

import pytest
import torch
from _support.loss_cases import BASE

from r2ec_kernels import recpo_loss

# three trajectories of 2, 0 and 3 counted tokens: exp(old - sampler) of each token
TOKENS = [[2.0, 8.0], [], [0.5, 0.25, 4.0]]
# mode: the factor of each token within 0.3 and 4, and what is logged of the ratios
MODES = {
    "token_truncate": ([2.0, 4.0, 0.5, 0.3, 4.0], (0.3, 10.8 / 5, 4.0)),
    "token_mask": ([2.0, 0.0, 0.5, 0.0, 4.0], (0.0, 6.5 / 5, 4.0)),
    # products: 16, 1 (of nothing), 0.5
    "sequence_truncate": ([4.0, 4.0, 0.5, 0.5, 0.5], (0.5, 5.5 / 3, 4.0)),
    "sequence_mask": ([0.0, 0.0, 0.5, 0.5, 0.5], (0.0, 1.5 / 3, 1.0)),
}


def case(dtype=torch.float64):
    """One group of three; the head's weight is 0, so every log-probability is -log 4."""
    trajectory = torch.tensor([0, 0, 1, 2, 2, 2])
    targets = torch.tensor([0, 1, -100, 2, 3, 0])
    sampler = torch.full((6,), torch.nan, dtype=dtype)  # not read where the token is not counted
    sampler[targets >= 0] = -torch.tensor(sum(TOKENS, []), dtype=dtype).log()
    hidden = torch.ones(6, 2, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 0]], dtype=dtype)
    states = torch.ones(3, 2, dtype=dtype)
    rewards = torch.tensor([[1.0, 0.0, 2.0]], dtype=dtype)
    arguments = (hidden, weight, targets, trajectory, rewards, states, states[:1])
    old = torch.zeros(6, dtype=dtype)
    return (*arguments, torch.tensor([0])), {"old_log_prob": old, "sampler_log_prob": sampler}


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_by_hand(mode, impl):
    arguments, stored = case()
    factors, logged = MODES[mode]
    config = dataclasses.replace(
        BASE,
        epsilon=1.0,
        estimator="rloo",
        importance_sampling_mode=mode,
        importance_sampling_clip_min=0.3,
        importance_sampling_clip_max=4.0,
        item_weight=0.0,
        impl=impl,
    )
    loss = recpo_loss(*arguments, **stored, config=config)
    # ratio 1/4; leave-one-out advantages 1 - 1, 0 - 1.5, 2 - 0.5; three trajectories
    advantages = torch.tensor([0.0, 0.0, 1.5, 1.5, 1.5], dtype=torch.float64)
    expected = -(advantages / 4 * torch.tensor(factors, dtype=torch.float64)).sum() / 3
    torch.testing.assert_close(loss.token_loss, expected)
    found = (loss.importance_ratio_min, loss.importance_ratio, loss.importance_ratio_max)
    torch.testing.assert_close(torch.stack(found), torch.tensor(logged, dtype=torch.float64))


def test_without_bounds_nothing_is_changed():
    arguments, stored = case()
    for mode in MODES:
        open_ended = dataclasses.replace(
            BASE, importance_sampling_mode=mode, importance_sampling_clip_max=None
        )
        found = recpo_loss(*arguments, **stored, config=open_ended)
        largest = 8.0 if mode.startswith("token") else 16.0
        torch.testing.assert_close(float(found.importance_ratio_max), largest)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_a_token_that_the_sampler_did_not_score_is_not_corrected(mode, impl):
    arguments, stored = case()
    config = dataclasses.replace(BASE, importance_sampling_mode=mode, impl=impl)
    stored["sampler_log_prob"][4] = torch.nan
    unknown = recpo_loss(*arguments, **stored, config=config)
    stored["sampler_log_prob"][4] = stored["old_log_prob"][4]
    equal = recpo_loss(*arguments, **stored, config=config)
    torch.testing.assert_close(unknown.token_loss, equal.token_loss)
    torch.testing.assert_close(unknown.importance_ratio, equal.importance_ratio)


def test_the_extremes_are_of_what_is_counted():
    """All ratios 16 times as large: a token that is not counted has none, an empty trajectory 1."""
    arguments, stored = case()
    stored["sampler_log_prob"] -= math.log(16)
    for mode, expected in (("token_mask", (4.0, 128.0)), ("sequence_mask", (1.0, 4096.0))):
        config = dataclasses.replace(
            BASE, importance_sampling_mode=mode, importance_sampling_clip_max=None
        )
        found = recpo_loss(*arguments, **stored, config=config)
        bounds = (float(found.importance_ratio_min), float(found.importance_ratio_max))
        assert bounds == pytest.approx(expected)

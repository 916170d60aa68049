"""RecPO's loss with one thing changed: what a control takes away, and faults that a test must see.

A change is planted from outside, in the name that a step calls; the library has no hook for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

from r2ec_fast.train import update
from r2ec_kernels import RecPOLoss, linear_logprob, recpo_loss

Loss = Callable[..., RecPOLoss]


def permuted_rewards(seed: int = 0) -> Loss:
    """Every reasoning gets the reward of a random one of the step, of any user."""
    generator = torch.Generator().manual_seed(seed)

    def loss(hidden, weight, targets, trajectory, rewards, *rest, num_selected, config, **settings):
        if len(rewards) * config.best != int(num_selected):
            raise ValueError("max_tokens_per_microbatch: expected room for a whole step")
        order = torch.randperm(rewards.numel(), generator=generator)
        rewards = rewards.flatten()[order].view_as(rewards)
        settings |= {"num_selected": num_selected, "config": config}
        return recpo_loss(hidden, weight, targets, trajectory, rewards, *rest, **settings)

    return loss


def no_token_gradient(seed: int = 0) -> Loss:
    """The item action trains alone."""
    return lambda hidden, *rest, **settings: recpo_loss(hidden.detach(), *rest, **settings)


def item_weight_of_release_0_1(seed: int = 0) -> Loss:
    """``loss_type="dapo"`` as it was: a token weighs 1 / n of the step's n tokens, an item action
    1 / (B m), as much as all tokens of its group together."""

    def loss(*states, num_tokens, num_selected, config, **settings):
        # the item action is divided by n too, so this weight leaves 1 / (B m)
        weight = float(num_tokens) / float(num_selected)
        config = replace(config, reduction="token", item_weight=weight)
        settings |= {"num_tokens": num_tokens, "num_selected": num_selected, "config": config}
        return recpo_loss(*states, **settings)

    return loss


def flipped_sign(seed: int = 0) -> Loss:
    """Reasonings of low reward are preferred."""

    def loss(hidden, weight, targets, trajectory, rewards, *rest, **settings):
        return recpo_loss(hidden, weight, targets, trajectory, -rewards, *rest, **settings)

    return loss


def sum_of_advantages(seed: int = 0) -> Loss:
    """Trap 1: every token gets the sum of its group's advantages, as where ratios [G, S] meet
    advantages [G, 1, 1]; the item action is left as it is."""

    def loss(hidden, weight, targets, trajectory, rewards, *rest, **settings):
        out = recpo_loss(hidden.detach(), weight, targets, trajectory, rewards, *rest, **settings)
        config, counted = settings["config"], targets != -100
        temperature = config.temperature
        log_prob = linear_logprob(hidden, weight, targets, temperature=temperature).log_prob
        ratio = torch.where(counted, log_prob - settings["old_log_prob"], 0.0).exp()
        group = out.advantages.sum(1)[trajectory // rewards.shape[1]]
        trajectories = settings["num_selected"] / config.best * rewards.shape[1]
        return out._replace(loss=out.loss - (ratio * group)[counted].sum() / trajectories)

    return loss


def log_probs_of_another_step(seed: int = 0) -> Loss:
    """Stale: the stored log-probabilities are those of the step before."""
    before: list[torch.Tensor] = []

    def loss(*states, old_log_prob, **settings):
        before.append(old_log_prob)
        stale = before.pop(0) if len(before) > 1 else old_log_prob
        place = torch.arange(len(old_log_prob)) % len(stale)
        return recpo_loss(*states, old_log_prob=stale[place], **settings)

    return loss


def log_probs_at_another_temperature(seed: int = 0) -> Loss:
    """Trap 6: the stored log-probabilities are taken at twice the sampling temperature."""

    def loss(hidden, weight, targets, *rest, old_log_prob, config, **settings):
        temperature = 2 * config.temperature
        other = linear_logprob(hidden.detach(), weight, targets, temperature=temperature).log_prob
        settings |= {"old_log_prob": other, "config": config}
        return recpo_loss(hidden, weight, targets, *rest, **settings)

    return loss


@contextmanager
def changed_loss(change: Callable[[int], Loss] | None, seed: int = 0) -> Iterator[None]:
    """Train with ``change`` instead of `recpo_loss`; None: with the loss as it is. The direct
    objective, which has no tokens, is left alone."""
    if change is None:
        yield
        return
    changed = change(seed)

    def loss(hidden: torch.Tensor, *rest: object, **settings: object) -> RecPOLoss:
        return (changed if len(hidden) else recpo_loss)(hidden, *rest, **settings)

    with mock.patch.object(update, "recpo_loss", loss):
        yield

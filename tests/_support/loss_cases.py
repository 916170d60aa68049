"""Calls of recpo_loss: small groups with a tie, an empty trajectory and repeated item ids."""

import torch

from r2ec_kernels import RecPOLossConfig, recpo_loss

GROUPS, GROUP, WIDTH, VOCAB, CATALOG = 3, 4, 8, 37, 11
LENGTHS = [3, 1, 4, 2, 5, 1, 2, 6, 0, 3, 3, 2]
NAMES = ("hidden", "user_states", "item_states")


def make(seed=0, dtype=torch.float64, width=WIDTH, vocab=VOCAB, catalog=CATALOG):
    """Arguments of one call; group 1 ties, trajectory 8 is empty, item rows repeat ids."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = sum(LENGTHS)
    case = {
        "hidden": randn(tokens, width).requires_grad_(),
        "weight": randn(vocab, width),
        "targets": torch.randint(0, vocab, (tokens,), generator=generator),
        "trajectory": torch.repeat_interleave(torch.tensor(LENGTHS)),
        "rewards": torch.rand(GROUPS, GROUP, generator=generator, dtype=torch.float64),
        "user_states": randn(GROUPS * GROUP, width).requires_grad_(),
        "item_states": randn(5, width).requires_grad_(),
        "item_ids": torch.tensor([3, 1, 3, 2, 1]),
        "item_targets": torch.tensor([2, 1, 3]),
    }
    case["rewards"][1] = 0.25
    case["targets"][4::7] = -100
    stored = {
        "old_log_prob": -6 * torch.rand(tokens, generator=generator, dtype=torch.float64),
        "sampler_log_prob": -6 * torch.rand(tokens, generator=generator, dtype=torch.float64),
        "ref_log_prob": -6 * torch.rand(tokens, generator=generator, dtype=torch.float64),
        "old_item_log_prob": -3 * torch.rand(12, generator=generator, dtype=torch.float64),
    }
    return case, {k: v.to(dtype) for k, v in stored.items()}, randn(catalog, width)


def call(case, config, **extra):
    case = dict(case)
    order = ("hidden", "weight", "targets", "trajectory", "rewards", "user_states")
    positional = [case.pop(k) for k in (*order, "item_states", "item_ids")]
    return recpo_loss(*positional, **case, **extra, config=config)


def gradients(case, loss, names=NAMES):
    return torch.autograd.grad(loss.loss, [case[n] for n in names])


BASE = RecPOLossConfig(item_temperature=0.5, max_completion_length=7)

"""The optimiser and its schedule of learning rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from r2ec_fast.config import RecPOConfig


def make_optimizer(config: RecPOConfig, parameters: list[torch.nn.Parameter]):
    if config.optim == "paged_adamw_8bit":
        try:
            from bitsandbytes.optim import PagedAdamW8bit
        except ImportError as error:
            raise ImportError(
                "optim='paged_adamw_8bit' needs `pip install bitsandbytes`"
            ) from error
        kind = PagedAdamW8bit
    else:
        kind = torch.optim.AdamW
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def make_schedule(config: RecPOConfig, optimizer: torch.optim.Optimizer, steps: int):
    from transformers import get_scheduler

    return get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=steps * config.num_iterations,
    )


def resume_schedule(scheduler, optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Go on at the step of a saved schedule, with the rates of this run's settings."""
    scheduler.load_state_dict({**saved, "base_lrs": scheduler.base_lrs})
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    # a scheduler counts on the optimiser to remember the rate it last set
    scheduler._last_lr = rates
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate

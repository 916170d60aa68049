"""The state of torch's random generators of this process: taken, and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def random_state() -> dict[str, torch.Tensor]:
    """Device type -> state of its generator, uint8 [n]: "cpu", and "cuda" where there is one."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Put back what :func:`random_state` gave; a device that ``state`` or the machine lacks stays
    as it is."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

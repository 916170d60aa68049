"""Tolerances as error budgets (CONTRIBUTING.md, What a change needs)."""

from collections.abc import Iterable

import torch


def assert_within_budget(
    ours: Iterable[torch.Tensor],
    plain: Iterable[torch.Tensor],
    exact: Iterable[torch.Tensor],
    *,
    share: float = 2.0,
    units: float = 1.0,
) -> None:
    """Each error against float64 is at most ``share`` times that of the same-dtype plain torch
    expression, plus ``units`` rounding units of the largest value."""
    for place, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert torch.isfinite(a).all(), f"result {place} is not finite"
        if not a.numel():
            continue
        error, allowed = ((x.double() - c).abs().max() for x in (a, b))
        limit = share * allowed + units * torch.finfo(a.dtype).eps * c.abs().max().clamp(min=1e-30)
        assert error <= limit, f"result {place}: error {error:.3g}, at most {limit:.3g}"

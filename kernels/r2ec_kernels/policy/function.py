"""The autograd boundary of the language-model head: one Function for every implementation."""

import torch

from . import impl_torch
from .config import HeadSettings


class LinearLogProb(torch.autograd.Function):
    """(log_prob [T], entropy [T] or [0]) of the targets.

    ``needed`` says which of (hidden, weight, bias) will be differentiated. Hidden alone (a frozen
    head): forward keeps the Jacobian rows and backward scales them. Otherwise, and for gradients
    of the entropy: backward recomputes the logits.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        differentiated: torch.Tensor | None,
        needed: tuple[bool, bool, bool],
        settings: HeadSettings,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        frozen = needed == (True, False, False)
        log_prob, entropy, maximum, total, jacobian = impl_torch.head_forward(
            hidden, weight, targets, bias, differentiated, frozen, settings
        )
        ctx.save_for_backward(hidden, weight, bias, targets, maximum, total, entropy, jacobian)
        ctx.needed, ctx.settings, ctx.frozen = needed, settings, frozen
        return log_prob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None):
        hidden, weight, bias, targets, maximum, total, entropy, jacobian = ctx.saved_tensors
        none = (None,) * 4
        if grad_log_prob is None and grad_entropy is None:
            return (None, None, None, *none)
        if ctx.frozen and grad_entropy is None:
            return ((grad_log_prob[:, None] * jacobian).to(hidden.dtype), None, None, *none)
        grads = impl_torch.head_backward(
            hidden,
            weight,
            targets,
            bias,
            maximum,
            total,
            entropy,
            grad_log_prob,
            grad_entropy,
            ctx.needed,
            ctx.settings,
        )
        return (grads.hidden, grads.weight, grads.bias, *none)

"""The autograd boundary of the language-model head: one Function for every implementation."""

import importlib
from types import ModuleType
from typing import Any

import torch

from .impl.common import HeadForward, HeadSettings
from .impl.shards import sum_over_shards


def implementation(name: str) -> ModuleType:
    """The module of "torch" or "triton"; triton is imported when it is first used."""
    return importlib.import_module(f".impl.{name}", __package__)


def settings_list(settings: HeadSettings) -> tuple[Any, ...]:
    """The settings as the ops of ``r2ec_kernels.ops`` take them."""
    return (
        settings.softcap,
        settings.temperature,
        settings.entropy,
        settings.compute,
        settings.impl,
        settings.every_row,
    )


class LinearLogProb(torch.autograd.Function):
    """(log_prob [T], entropy [T] or [0]) of the targets.

    ``needed`` says which of (hidden, weight, bias) will be differentiated. Hidden alone (a frozen
    head): forward keeps the Jacobian rows and backward scales them. Otherwise, and for gradients
    of the entropy: backward recomputes the logits. In eager mode the implementation is called
    directly; under torch.compile it is one opaque op each way.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
        mode = "jacobian" if frozen else "logits" if any(needed) else "value"
        inputs = (hidden, weight, targets, bias, differentiated, mode)
        with torch.autocast(hidden.device.type, enabled=False):
            if torch.compiler.is_compiling():
                op = torch.ops.r2ec_kernels.linear_logprob_forward
                out = HeadForward(*op(*inputs, *settings_list(settings)))
            else:
                out = implementation(settings.impl).head_forward(*inputs, settings)
        ctx.save_for_backward(hidden, weight, bias, targets, *out)
        ctx.needed, ctx.settings, ctx.frozen = needed, settings, frozen
        return out.log_prob, out.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, *saved = ctx.saved_tensors
        none = (None,) * 4
        if not ctx.settings.entropy:
            grad_entropy = None  # torch.compile hands over zeros
        if grad_log_prob is None and grad_entropy is None:
            return (None, None, None, *none)
        out = HeadForward(*saved)
        if ctx.frozen and grad_entropy is None:
            assert grad_log_prob is not None  # not both, see above
            if ctx.settings.group is not None:
                grad_hidden = sum_over_shards(grad_log_prob[:, None] * out.jacobian, ctx.settings)
                return (grad_hidden.to(hidden.dtype), None, None, *none)
            if torch.compiler.is_compiling():
                grad_hidden = (grad_log_prob[:, None] * out.jacobian).to(hidden.dtype)
            else:  # in one pass
                grad_hidden = torch.empty_like(out.jacobian, dtype=hidden.dtype)
                torch.mul(grad_log_prob[:, None], out.jacobian, out=grad_hidden)
            return (grad_hidden, None, None, *none)
        inputs = (hidden, weight, targets, bias)
        rest = (grad_log_prob, grad_entropy, ctx.needed)
        with torch.autocast(hidden.device.type, enabled=False):
            if torch.compiler.is_compiling():
                op = torch.ops.r2ec_kernels.linear_logprob_backward
                grads = op(*inputs, list(out), *rest, *settings_list(ctx.settings))
                grads = [g if n else None for g, n in zip(grads, ctx.needed, strict=True)]
            else:
                backward = implementation(ctx.settings.impl).head_backward
                grads = backward(*inputs, out, *rest, ctx.settings)
        return (*grads, *none)

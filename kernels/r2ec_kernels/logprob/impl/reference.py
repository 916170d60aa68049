"""linear_logprob as its definition, in any dtype. Materialises the logits."""

import torch

from ..._checks import IGNORE
from .common import HeadSettings, LogProb


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    settings: HeadSettings,
) -> LogProb:
    """``log_softmax(cap(hidden @ weight.T + bias) / temperature)`` at the targets."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if settings.softcap is not None:
        logits = settings.softcap * torch.tanh(logits / settings.softcap)
    log_p = torch.log_softmax(logits / settings.temperature, dim=-1)
    counted = targets != IGNORE
    picked = log_p.gather(1, targets.where(counted, 0)[:, None])[:, 0]
    log_prob = torch.where(counted, picked, 0.0)
    if not settings.entropy:
        return LogProb(log_prob, None)
    plogp = torch.where(log_p.isneginf(), 0.0, log_p.exp() * log_p)
    return LogProb(log_prob, torch.where(counted, -plogp.sum(-1), 0.0))

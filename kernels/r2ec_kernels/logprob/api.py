"""Log-probabilities of a language-model head without its [tokens, vocabulary] logits."""

import torch

from .._checks import as_number, check_float, check_ids, check_positive, check_shape, check_widths
from .._dispatch import resolve
from .function import LinearLogProb
from .impl import reference
from .impl.common import HeadSettings, LogProb, compute_dtype

_AVAILABLE = frozenset({"triton", "torch", "reference"})


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    impl: str = "auto",
) -> LogProb:
    """Log-probabilities of a language-model head without its [tokens, vocabulary] logits.

    Equal to::

        logits = hidden @ weight.T + bias
        logits = softcap * tanh(logits / softcap)
        log_p = log_softmax(logits / temperature, dim=-1)
        log_prob = log_p.gather(1, targets[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)

    With a frozen head it costs two matrix products of that size, forward and backward together: one
    pass yields the log-probability and d log_prob / d hidden, which backward scales (``1 + 1``
    units; a trainable head recomputes its logits, 4 units). No top-k truncation. With ``weight`` =
    an item table [N, d] it is the full-catalog softmax.

    Args:
        hidden: [T, d] states after the final norm.
        weight: [V, d], the head.
        targets: int64 [T] in 0..V-1, or -100: not counted, log_prob and entropy 0, no gradient.
        bias: [V] or None.
        softcap: the cap of Gemma-2's logits, or None.
        temperature: the sampling temperature, > 0.
        entropy: also return the entropies, in nats.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        ``LogProb(log_prob [T], entropy [T] | None)``, float32 (float64 for float64 inputs).
        Differentiable in hidden, weight and bias, the entropy too; once, not twice.

    Raises:
        TypeError, ValueError: wrong type, shape or range.
        RuntimeError: ``impl`` cannot run here.
    """
    check_head(hidden, weight, targets, bias)
    settings = head_settings(softcap, temperature, entropy, impl, hidden, weight)
    return head_logprob(hidden, weight, targets, bias, None, settings)


def head_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    differentiated: torch.Tensor | None,
    settings: HeadSettings,
) -> LogProb:
    if settings.impl == "reference":
        return reference.linear_logprob(hidden, weight, targets, bias, settings)
    needed = (False, False, False)
    if torch.is_grad_enabled():
        bias_needed = bias is not None and bias.requires_grad
        needed = (hidden.requires_grad, weight.requires_grad, bias_needed)
    log_prob, entropies = LinearLogProb.apply(
        hidden, weight, bias, targets, differentiated, needed, settings
    )
    return LogProb(log_prob, entropies if settings.entropy else None)


def head_settings(
    softcap: float | None,
    temperature: float,
    entropy: bool,
    impl: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
) -> HeadSettings:
    if softcap is not None and not as_number("softcap", softcap) > 0:
        raise ValueError(f"softcap: expected a number > 0 or None, got {softcap}")
    check_positive("temperature", temperature)
    compute = compute_dtype(hidden, weight)
    if impl == "auto" and compute == torch.float64:
        impl = "torch"  # float64 has no kernels
    impl = resolve(impl, hidden.device, "linear_logprob", _AVAILABLE)
    softcap = None if softcap is None else float(softcap)
    return HeadSettings(softcap, float(temperature), entropy, compute, impl)


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    check_widths("hidden", hidden, "weight", weight, rows=("T", "V"))
    if weight.shape[0] == 0:
        raise ValueError("weight: expected at least one row, got [0, d]")
    check_ids("targets", targets, hidden.shape[0], 0, weight.shape[0], ignore=True)
    if bias is not None:
        check_float("bias", bias, 1)
        check_shape("bias", bias, [weight.shape[0]])

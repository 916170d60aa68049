"""Log-probabilities of a language-model head without its [tokens, vocabulary] logits."""

import torch
import torch.distributed as dist

from .._checks import (
    as_int,
    as_number,
    check_float,
    check_ids,
    check_positive,
    check_shape,
    check_widths,
)
from .._dispatch import resolve
from .function import LinearLogProb
from .impl import reference
from .impl.common import HeadSettings, LogProb, compute_dtype
from .impl.shards import ELSEWHERE, local_targets

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
    group: dist.ProcessGroup | None = None,
    first_token: int = 0,
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
        group: processes that hold the head's rows together, each a shard: ``weight`` and ``bias``
            are the rows ``first_token``, ``first_token + 1``, ... of the head; all other arguments,
            and what is done with the results, are the same in every process, and so are the
            results. Two small all-reduces for each tile of rows in forward, one of the gradient of
            ``hidden`` in backward; gradients of ``weight`` and ``bias`` are the shard's own.
        first_token: with ``group``, the number of the shard's first row.

    Returns:
        ``LogProb(log_prob [T], entropy [T] | None)``, float32 (float64 for float64 inputs).
        Differentiable in hidden, weight and bias, the entropy too; once, not twice.

    Raises:
        TypeError, ValueError: wrong type, shape or range.
        RuntimeError: ``impl`` cannot run here.
    """
    first_token = check_shard(group, first_token)
    check_head(hidden, weight, targets, bias, group)
    settings = head_settings(softcap, temperature, entropy, impl, hidden, weight, group)
    targets = shard_targets(targets, weight, first_token, settings)
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
    group: dist.ProcessGroup | None = None,
) -> HeadSettings:
    if softcap is not None and not as_number("softcap", softcap) > 0:
        raise ValueError(f"softcap: expected a number > 0 or None, got {softcap}")
    check_positive("temperature", temperature)
    compute = compute_dtype(hidden, weight)
    if impl == "auto" and compute == torch.float64:
        impl = "torch"  # float64 has no kernels
    impl = resolve(impl, hidden.device, "linear_logprob", _AVAILABLE)
    if group is not None and (impl == "reference" or torch.compiler.is_compiling()):
        how = "under torch.compile" if torch.compiler.is_compiling() else "impl='reference'"
        raise RuntimeError(f"group: shards of the vocabulary are not implemented {how}")
    softcap = None if softcap is None else float(softcap)
    # a row that is left out on one process must be on all; on a GPU none is
    every_row = group is not None and impl == "triton"
    return HeadSettings(softcap, float(temperature), entropy, compute, impl, every_row, group)


def check_shard(group: dist.ProcessGroup | None, first_token: int) -> int:
    """Raise unless these describe a shard, or the whole vocabulary; returns ``first_token``."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup or None, got {type(group).__name__}")
    first_token = as_int("first_token", first_token, 0)
    if group is None and first_token:
        raise ValueError(f"first_token: expected 0 without group, got {first_token}")
    return first_token


def shard_targets(
    targets: torch.Tensor, weight: torch.Tensor, first_token: int, settings: HeadSettings
) -> torch.Tensor:
    """Targets as rows of ``weight``."""
    if settings.group is None:
        return targets
    return local_targets(targets, first_token, weight.shape[0])


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    group: dist.ProcessGroup | None = None,
) -> None:
    check_widths("hidden", hidden, "weight", weight, rows=("T", "V"))
    if weight.shape[0] == 0:
        raise ValueError("weight: expected at least one row, got [0, d]")
    vocab = weight.shape[0] if group is None else ELSEWHERE  # a shard does not know the whole
    check_ids("targets", targets, hidden.shape[0], 0, vocab, ignore=True)
    if bias is not None:
        check_float("bias", bias, 1)
        check_shape("bias", bias, [weight.shape[0]])

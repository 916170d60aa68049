"""What ``sharded_target_stats`` exchanges between ranks: the targets' rows, and the parts' results.

A part g is one rank's rows, and the target beside them where it is not among them. With rank_g and
p_g of the target in its part, where S_g is what the part's other rows weigh beside the target::

    rank = 1 + sum_g (rank_g - 1)
    1 / p = 1 + sum_g S_g,  S_g = 1 / p_g - 1

The weights leave float64 where scores are far above the target's, so their logarithms are summed.
"""

import torch

from .._collective import all_gather, all_reduce
from .._dispatch import checks_enabled

_OP = "sharded_target_stats"


def gather_target_rows(
    items: torch.Tensor, at: torch.Tensor, group: torch.distributed.ProcessGroup | None
) -> torch.Tensor:
    """The targets' rows [B, d] on every rank, bit for bit, from the ranks that hold them.

    Args:
        items: [n, d], the local rows.
        at: int64 [B], the targets' positions in them; -1 or n where they are another rank's.
    """
    rows = items.new_zeros(at.numel(), items.shape[1])
    held = is_held(at, len(items))
    if len(items):
        near = items[at.clamp(0, len(items) - 1)]
        rows = torch.where(held[:, None], near, rows).contiguous()
    all_reduce(_OP, rows.view(torch.uint8), group)  # bytes: a sum of floats loses the sign of -0.0
    return rows


def is_held(at: torch.Tensor, num_rows: int) -> torch.Tensor:
    """bool [B]: whether a position is one of the ``num_rows`` rows."""
    return (at >= 0) & (at < num_rows)


def merge_parts(
    rank: torch.Tensor,
    log_prob: torch.Tensor,
    held: torch.Tensor,
    targets: torch.Tensor,
    group: torch.distributed.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank int64 [B], log_prob float32 [B]) of the whole table, on every rank the same.

    Args:
        rank, log_prob: [B], of the targets in the local part.
        held: bool [B], which targets are local rows.
        targets: int64 [B], global ids, for messages.

    Raises:
        ValueError: a target is a row of no rank, or of several. Targets on a GPU are checked only
            under ``R2EC_CHECK=1``; such a one has rank -1 and NaN there.
    """
    own = torch.stack([rank.double(), log_prob.double(), held.double()])
    ranks, log_probs, holders = torch.stack(all_gather(_OP, own, group), dim=1)  # [ranks, B] each
    lost = holders.sum(0) != 1
    if (targets.device.type == "cpu" or checks_enabled()) and bool(lost.any()):
        target, count = int(targets[lost][0]), int(holders.sum(0)[lost][0])
        raise ValueError(
            f"targets: expected ids that are rows of one rank each, got {target}, a row of "
            f"{count} ranks"
        )
    whole = (1 + (ranks - 1).sum(0)).long().masked_fill(lost, -1)
    return whole, merged_log_prob(log_probs).masked_fill(lost, torch.nan)


def merged_log_prob(log_probs: torch.Tensor) -> torch.Tensor:
    """float32 [B] of the parts' log-probabilities, float64 [parts, B]."""
    surprise = (-log_probs).clamp_min(0.0)  # -log p; rounding may take it below 0
    # log S = log(1 / p - 1), also where 1 / p overflows; -inf for p = 1, inf for p = 0
    log_weight = surprise + torch.log(-torch.expm1(-surprise))
    total = torch.logsumexp(log_weight, dim=0)
    return 0.0 - torch.logaddexp(total, torch.zeros_like(total)).float()

"""Launchers of the objective's kernels (``triton_kernels``) and of the item action's
(``triton_item_kernels``): two or three launches make the loss, its gradient by the
log-probabilities and the statistics, and nothing waits for the device."""

from typing import Any

import torch
import triton

from ..config import RecPOLossConfig
from .common import Actions, Outcome, StepCounts, corrects_tokens, per_selected
from .triton_item_kernels import project_kernel, softmax_kernel
from .triton_kernels import token_kernel, total_kernel, trajectory_kernel

BLOCK_T = 1024  # tokens of a program
BLOCK_R, BLOCK_SUM = 16, 512  # trajectories of a program, and the tokens it sums at once
BLOCK_P = 128  # programs whose partial sums are read at once
BLOCK_M = 1024  # candidates of a step
BLOCK_D = 1024  # columns of a step
BLOCK_SIZES = ("BLOCK_T", "BLOCK_R", "BLOCK_SUM", "BLOCK_P", "BLOCK_M", "BLOCK_D")  # for tests
PARTIALS = 10  # numbers that a program of the token kernel leaves
RESULTS = (  # of the totals
    *("token_loss", "item_loss", "clip_fraction", "clip_fraction_low", "clip_fraction_high"),
    *("item_clip_fraction", "ratio", "importance_ratio", "importance_ratio_min"),
    *("importance_ratio_max", "kl", "entropy"),
)


def objective(
    log_prob: torch.Tensor,
    entropy: torch.Tensor | None,
    item_log_prob: torch.Tensor,
    actions: Actions,
    counts: StepCounts,
    config: RecPOLossConfig,
) -> tuple[torch.Tensor, Outcome, torch.Tensor]:
    """(loss [], what it consists of, d loss / d log-probability [T + R]: tokens, then items)."""
    tokens, rows = log_prob.shape[0], item_log_prob.shape[0]
    made: dict[str, Any] = {"dtype": torch.float32, "device": log_prob.device}
    programs = triton.cdiv(tokens, BLOCK_T)
    grad = torch.empty(tokens + rows, **made)
    partial = torch.empty(PARTIALS, programs, **made)
    loss, result = torch.empty((), **made), torch.empty(len(RESULTS), **made)
    counted = torch.empty((), dtype=torch.int64, device=log_prob.device)
    sums = _sums(log_prob, actions, counts, rows, config)
    common = _arguments(log_prob, actions, counts, sums, rows, config)
    common |= {"partial_ptr": partial, "programs": programs}
    old, sampler, ref = actions.stored
    if programs:
        token_kernel[(programs,)](
            log_prob_ptr=log_prob,
            entropy_ptr=log_prob if entropy is None else entropy,
            target_ptr=actions.targets,
            trajectory_ptr=actions.trajectory,
            old_ptr=log_prob if old is None else old,
            sampler_ptr=log_prob if sampler is None else sampler,
            ref_ptr=log_prob if ref is None else ref,
            grad_ptr=grad,
            num_tokens=tokens,
            kl_weight=config.kl_weight,
            SEQUENCE_RATIO=config.ratio_level == "sequence",
            HAS_OLD=old is not None,
            HAS_REF=ref is not None,
            HAS_ENTROPY=entropy is not None,
            BLOCK_T=BLOCK_T,
            num_warps=4,
            **common,
        )
    old_items = actions.old_items
    total_kernel[(1,)](
        item_log_prob_ptr=item_log_prob,
        old_item_ptr=item_log_prob if old_items is None else old_items,
        best_ptr=actions.best.view(torch.int8),
        grad_ptr=grad[tokens:],
        loss_ptr=loss,
        result_ptr=result,
        count_ptr=counted,
        item_weight=config.item_weight,
        HAS_OLD_ITEM=old_items is not None,
        HAS_REF=ref is not None,
        HAS_ENTROPY=entropy is not None,
        BLOCK_P=BLOCK_P,
        BLOCK_R=BLOCK_P,
        num_warps=4,
        **common,
    )
    found = dict(zip(RESULTS, result.unbind(), strict=True))
    outcome = Outcome(num_tokens=counted, **found)
    if sampler is None:
        outcome = outcome._replace(
            importance_ratio=None, importance_ratio_min=None, importance_ratio_max=None
        )
    if ref is None:
        outcome = outcome._replace(kl=None)
    if entropy is None:
        outcome = outcome._replace(entropy=None)
    return loss, outcome, grad


def _sums(
    log_prob: torch.Tensor,
    actions: Actions,
    counts: StepCounts,
    rows: int,
    config: RecPOLossConfig,
) -> torch.Tensor | None:
    """What ``trajectory_kernel`` sums, [4, R]; None where nothing needs it."""
    old, sampler, _ = actions.stored
    local = config.reduction == "token" and counts.tokens is None
    by_row = "sequence" in (config.reduction, config.ratio_level)
    if not (local or by_row or (sampler is not None and not corrects_tokens(config))):
        return None
    sums = torch.empty(4, rows, dtype=torch.float32, device=log_prob.device)
    low, high = _bounds(config)
    if rows:
        trajectory_kernel[(triton.cdiv(rows, BLOCK_R),)](
            log_prob_ptr=log_prob,
            target_ptr=actions.targets,
            trajectory_ptr=actions.trajectory,
            old_ptr=log_prob if old is None else old,
            sampler_ptr=log_prob if sampler is None else sampler,
            sums_ptr=sums,
            num_tokens=log_prob.shape[0],
            num_rows=rows,
            low=low,
            high=high,
            MASK=config.importance_sampling_mode.endswith("mask"),
            HAS_OLD=old is not None,
            HAS_SAMPLER=sampler is not None,
            BLOCK_R=BLOCK_R,
            BLOCK_T=BLOCK_SUM,
            num_warps=4,
        )
    return sums


def _arguments(
    log_prob: torch.Tensor,
    actions: Actions,
    counts: StepCounts,
    sums: torch.Tensor | None,
    rows: int,
    config: RecPOLossConfig,
) -> dict[str, Any]:
    """What the token and the total kernel share."""
    low, high = _bounds(config)
    device = log_prob.device
    tokens, tokens_there = _count(counts.tokens, device)
    selected, selected_there = _count(counts.selected, device)
    factor = per_selected(counts, config)
    if counts.selected is None:
        selected, factor = float(rows), 1.0
    return {
        "advantage_ptr": actions.advantages,
        "sums_ptr": log_prob if sums is None else sums,
        "tokens_ptr": log_prob if tokens_there is None else tokens_there,
        "selected_ptr": log_prob if selected_there is None else selected_there,
        "num_rows": rows,
        "tokens": tokens,
        "selected": selected,
        "per_selected": factor,
        "length": float(config.max_completion_length or 0),
        "clip_low": 1 - config.epsilon,
        "clip_high": 1 + config.epsilon_high,
        "low": low,
        "high": high,
        "REDUCTION": config.reduction,
        "SEQUENCE_CORRECTION": not corrects_tokens(config),
        "MASK": config.importance_sampling_mode.endswith("mask"),
        "HAS_SUMS": sums is not None,
        "HAS_SAMPLER": actions.stored.sampler is not None,
        "TOKENS_LOCAL": config.reduction == "token" and counts.tokens is None,
        "TOKENS_ON_DEVICE": tokens_there is not None,
        "SELECTED_ON_DEVICE": selected_there is not None,
    }


def _count(
    value: float | torch.Tensor | None, device: torch.device
) -> tuple[float, torch.Tensor | None]:
    """(the number, None), or (0, the tensor) where only the device knows it."""
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return 0.0, value
        value = value.item()
    return float(value or 0), None


def _bounds(config: RecPOLossConfig) -> tuple[float, float]:
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    return (
        float("-inf") if low is None else float(low),
        float("inf") if high is None else float(high),
    )


def item_softmax(
    users: torch.Tensor,  # float32 [R, d]
    items: torch.Tensor,  # float32 [M, d]
    item_ids: torch.Tensor,
    item_targets: torch.Tensor,
    cosine: bool,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability of each trajectory's target [R], its derivative by the products [R, M])."""
    (rows, d), num_items = users.shape, items.shape[0]
    slope = torch.mm(users, items.T)
    norm = torch.linalg.vector_norm(items, dim=1) if cosine else items
    log_prob = torch.empty_like(users[:, 0])
    if rows:
        softmax_kernel[(rows,)](
            dot_ptr=slope,
            user_ptr=users,
            norm_ptr=norm,
            item_id_ptr=item_ids,
            item_target_ptr=item_targets,
            log_prob_ptr=log_prob,
            slope_ptr=slope,
            group=rows // item_targets.shape[0],
            num_items=num_items,
            d=d,
            inverse_temperature=1 / temperature,
            COSINE=cosine,
            BLOCK_M=min(BLOCK_M, triton.next_power_of_2(num_items)),
            BLOCK_D=min(BLOCK_D, triton.next_power_of_2(d)),
            num_warps=4,
        )
    return log_prob, slope


def without_parallel(grad: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``grad`` [N, d] less its part along ``rows`` [N, d], both float32, as ``dtype``."""
    out = torch.empty_like(rows, dtype=dtype)
    if rows.numel():
        project_kernel[(rows.shape[0],)](
            grad_ptr=grad,
            row_ptr=rows,
            out_ptr=out,
            d=rows.shape[1],
            BLOCK_D=min(BLOCK_D, triton.next_power_of_2(rows.shape[1])),
            num_warps=4,
        )
    return out


def aot_configs() -> list[dict[str, Any]]:
    """Every configuration that ships, for ahead-of-time compilation (``r2ec_kernels.aot``)."""
    from . import triton_shipped

    return triton_shipped.aot_configs()

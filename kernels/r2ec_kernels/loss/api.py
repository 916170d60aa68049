"""The RecPO loss of whole groups of trajectories."""

from dataclasses import replace

import torch
import torch.distributed as dist

from .._checks import as_number, check_float, check_ids, check_shape
from ..advantage.api import advantages_of
from ..logprob.api import check_head, check_shard, head_logprob, head_settings, shard_targets
from . import function
from .config import RecPOLoss, RecPOLossConfig
from .impl import item_action, objective, reference
from .impl.common import Actions, StepCounts, StoredLogProbs


def recpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    trajectory: torch.Tensor,
    rewards: torch.Tensor,
    user_states: torch.Tensor,
    item_states: torch.Tensor,
    item_ids: torch.Tensor,
    *,
    item_targets: torch.Tensor | None = None,
    item_table: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    old_log_prob: torch.Tensor | None = None,
    old_item_log_prob: torch.Tensor | None = None,
    sampler_log_prob: torch.Tensor | None = None,
    ref_log_prob: torch.Tensor | None = None,
    num_tokens: int | torch.Tensor | None = None,
    num_selected: int | torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    first_token: int = 0,
    config: RecPOLossConfig | None = None,
) -> RecPOLoss:
    """The RecPO loss of whole groups of trajectories, without logits (docs/method.md#objective).

    Equal to, with ``A, best = grouped_advantage(rewards)`` and ``l`` the clipped product::

        log_prob = linear_logprob(hidden, weight, targets).log_prob
        ratio = exp(log_prob - old_log_prob)
        token_loss = ((-l(ratio, A[trajectory]) + kl_weight * k3) * action[trajectory]).sum()
        item_ratio = exp(item_log_prob - old_item_log_prob)
        item_loss = (-l(item_ratio, A) * action)[best].sum()
        loss = token_loss + item_weight * item_loss

    where ``action`` [B*G] is what one action of a trajectory weighs, by ``config.reduction``. Every
    trajectory trains its reasoning tokens with its own advantage; only the best ones of a group
    train the item action, which is one more action of its trajectory: with ``item_weight`` 1 it
    weighs as much as one token, as in the paper. Tokens whose advantage is exactly zero cost one
    product, not two.

    Args:
        hidden: [T, d] states that predict the tokens (after the final norm).
        weight: [V, d] language-model head; its gradient is computed only if it requires one.
        targets: int64 [T], the sampled tokens; -100: not counted.
        trajectory: int64 [T] in 0..B*G-1, whose token it is.
        rewards: [B, G], constants.
        user_states: [B*G, d], the read-out of each trajectory, in trajectory order.
        item_states: [M, d], freshly encoded items: every user's target is among them.
        item_ids: int64 [M], their ids. Other rows with the target's id are not candidates.
        item_targets: int64 [B], the row of each user's target in ``item_states``; None: arange(B).
        item_table: [N, d], row i = item i; required by, and only for, ``item_negatives="catalog"``.
            No gradient flows to it.
        bias: [V], of the language-model head.
        old_log_prob: [T], stored when the tokens were sampled; None: ratio 1.
        old_item_log_prob: [B*G] or [B, G], stored likewise; None: ratio 1.
        sampler_log_prob: [T], of a sampler with other numerics: token losses are multiplied by the
            ratio of ``config.importance_sampling_mode``. NaN, where the sampler has none: as if it
            were ``old_log_prob``.
        ref_log_prob: [T], of the reference model; required if ``kl_weight > 0``.
        num_tokens: counted tokens of the whole optimiser step, over all calls and ranks; None: of
            this call. Where it is 0 the token loss is 0, with gradients of 0.
        num_selected: selected trajectories (groups * best) of the whole optimiser step; None: of
            this call. The number of trajectories of the step, which every reduction but "token"
            divides by, follows from it.
        group: processes that hold the rows of ``weight`` and ``bias`` together, as in
            :func:`r2ec_kernels.linear_logprob`; all other arguments, the results and the gradients
            of the states are the same in every process.
        first_token: with ``group``, the number of the first row that ``weight`` holds.
        config: see :class:`RecPOLossConfig`.

    Returns:
        :class:`RecPOLoss`. With the step's normalisers the losses of its calls add up to the
        step's loss. A trainer whose gradients are averaged over ranks multiplies by their number.

    Raises:
        TypeError, ValueError: wrong type, shape or range.
        RuntimeError: ``impl`` cannot run here.
    """
    config = RecPOLossConfig() if config is None else config
    if item_targets is None:
        item_targets = torch.arange(rewards.shape[0], device=item_states.device)
    stored = StoredLogProbs(old_log_prob, sampler_log_prob, ref_log_prob)
    first_token = check_shard(group, first_token)
    check_head(hidden, weight, targets, bias, group)
    _check_groups(targets, trajectory, rewards, user_states, config)
    _check_items(rewards, user_states, item_states, item_ids, item_targets, item_table, config)
    _check_stored(targets, stored, rewards, old_item_log_prob, config)
    settings = head_settings(
        config.softcap, config.temperature, config.entropy, config.impl, hidden, weight, group
    )
    targets = shard_targets(targets, weight, first_token, settings)
    for name, count in (("num_tokens", num_tokens), ("num_selected", num_selected)):
        _check_count(name, count)
    fused = settings.impl == "triton" and not torch.compiler.is_compiling()
    if fused:  # every row takes part, so that nothing waits for the device
        settings = replace(settings, every_row=True)

    advantages, best = advantages_of(
        rewards.detach(), config.estimator, config.best, "triton" if fused else "torch"
    )
    if old_item_log_prob is not None:
        old_item_log_prob = old_item_log_prob.detach().flatten()
    actions = Actions(
        targets, trajectory, advantages.flatten(), best.flatten(), old_item_log_prob, stored
    )
    counts = StepCounts(num_tokens, num_selected, rewards.shape[1])
    differentiated = None  # rows whose gradient can differ from zero
    if config.kl_weight == 0 and not fused:
        differentiated = actions.advantages[trajectory] != 0
    log_prob, entropy = head_logprob(hidden, weight, targets, bias, differentiated, settings)
    items = (user_states, item_states, item_ids, item_targets, item_table)
    if fused:
        item_log_prob = function.item_log_prob(*items, config)
        loss, outcome = function.objective(
            log_prob, entropy, item_log_prob, actions, counts, config
        )
    else:
        plain = settings.impl == "reference"
        item_log_prob = (reference if plain else item_action).item_log_prob(*items, config)
        terms = (log_prob, entropy, item_log_prob, actions, counts, config)
        loss, outcome = objective.objective(*terms)
        if plain:
            tokens, item = reference.objective(log_prob, item_log_prob, actions, counts, config)
            loss = tokens + config.item_weight * item
            outcome = outcome._replace(token_loss=tokens.detach(), item_loss=item.detach())
    return RecPOLoss(
        loss=loss,
        log_prob=log_prob.detach(),
        item_log_prob=item_log_prob.detach().view_as(rewards),
        advantages=advantages,
        best=best,
        **outcome._asdict(),
    )


def _check_count(name: str, value: float | torch.Tensor | None) -> None:
    # a compiled graph holds for any count
    if value is None or isinstance(value, torch.Tensor) or torch.compiler.is_compiling():
        return
    if not as_number(name, value) >= 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")


def _check_groups(
    targets: torch.Tensor,
    trajectory: torch.Tensor,
    rewards: torch.Tensor,
    user_states: torch.Tensor,
    config: RecPOLossConfig,
) -> None:
    check_float("rewards", rewards, 2)
    check_float("user_states", user_states, 2)
    check_ids("trajectory", trajectory, targets.shape[0], 0, rewards.numel())
    if user_states.shape[0] != rewards.numel():
        raise ValueError(
            f"user_states: expected one row per trajectory, {rewards.numel()} for rewards "
            f"{list(rewards.shape)}, got {list(user_states.shape)}"
        )
    if config.best > rewards.shape[1]:
        raise ValueError(
            f"best: expected at most the group size {rewards.shape[1]}, got {config.best}"
        )


def _check_items(
    rewards: torch.Tensor,
    user_states: torch.Tensor,
    item_states: torch.Tensor,
    item_ids: torch.Tensor,
    item_targets: torch.Tensor,
    item_table: torch.Tensor | None,
    config: RecPOLossConfig,
) -> None:
    check_float("item_states", item_states, 2)
    d = user_states.shape[1]
    if item_states.shape[1] != d:
        raise ValueError(f"item_states: expected [M, {d}], got {list(item_states.shape)}")
    catalog = config.item_negatives == "catalog"
    if catalog != (item_table is not None):
        raise ValueError(
            "item_table: expected [N, d] with item_negatives='catalog' and None otherwise, got "
            f"{'None' if item_table is None else list(item_table.shape)} with "
            f"{config.item_negatives!r}"
        )
    high = torch.iinfo(torch.int64).max
    if item_table is not None:
        check_float("item_table", item_table, 2)
        check_shape("item_table", item_table, [item_table.shape[0], d])
        high = item_table.shape[0]
    check_ids("item_ids", item_ids, item_states.shape[0], 0, high)
    check_ids("item_targets", item_targets, rewards.shape[0], 0, item_states.shape[0])


def _check_stored(
    targets: torch.Tensor,
    stored: StoredLogProbs,
    rewards: torch.Tensor,
    old_item_log_prob: torch.Tensor | None,
    config: RecPOLossConfig,
) -> None:
    for name, value in stored._asdict().items():
        if value is not None:
            check_float(f"{name}_log_prob", value, 1)
            check_shape(f"{name}_log_prob", value, list(targets.shape))
    if config.kl_weight and stored.ref is None:
        raise ValueError("ref_log_prob: expected [T] log-probabilities because kl_weight > 0")
    if old_item_log_prob is not None and old_item_log_prob.numel() != rewards.numel():
        raise ValueError(
            f"old_item_log_prob: expected one number per trajectory, {rewards.numel()}, "
            f"got shape {list(old_item_log_prob.shape)}"
        )

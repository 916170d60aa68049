"""The autograd boundary of the objective's Triton kernels. Under torch.compile the plain torch
objective runs instead, which the compiler fuses."""

from typing import Any

import torch

from .config import RecPOLossConfig
from .impl import item_action
from .impl.common import Actions, Outcome, StepCounts, StoredLogProbs


def objective(
    log_prob: torch.Tensor,
    entropy: torch.Tensor | None,
    item_log_prob: torch.Tensor,
    actions: Actions,
    counts: StepCounts,
    config: RecPOLossConfig,
) -> tuple[torch.Tensor, Outcome]:
    """As ``impl.objective.objective``, in two or three launches."""
    actions = Actions(
        targets=actions.targets.contiguous(),
        trajectory=actions.trajectory.contiguous(),
        advantages=actions.advantages.contiguous(),
        best=actions.best.contiguous(),
        old_items=_constant(actions.old_items),
        stored=StoredLogProbs(*(_constant(value) for value in actions.stored)),
    )
    found: list[Outcome] = []
    loss = Objective.apply(log_prob, item_log_prob, entropy, actions, counts, config, found)
    return loss, found[0]


def _constant(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.detach().contiguous()


class Objective(torch.autograd.Function):
    """The loss of log-probabilities [T] and [R]; its gradient is made with it. What it consists of
    is put into the list ``found``: constants, no results of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        log_prob: torch.Tensor,
        item_log_prob: torch.Tensor,
        entropy: torch.Tensor | None,
        actions: Actions,
        counts: StepCounts,
        config: RecPOLossConfig,
        found: list[Outcome],
    ) -> torch.Tensor:
        from .impl import triton

        loss, outcome, grad = triton.objective(
            log_prob, entropy, item_log_prob, actions, counts, config
        )
        found.append(outcome)
        ctx.save_for_backward(grad)
        ctx.sizes = (log_prob.shape[0], item_log_prob.shape[0])
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        tokens, items = (grad * grad_loss).split(ctx.sizes)
        return tokens, items, None, None, None, None, None


def item_log_prob(
    user_states: torch.Tensor,
    item_states: torch.Tensor,
    item_ids: torch.Tensor,
    item_targets: torch.Tensor,
    item_table: torch.Tensor | None,
    config: RecPOLossConfig,
) -> torch.Tensor:
    """As ``impl.item_action.item_log_prob``, which computes what has no kernel: distances, the
    catalog, and float64."""
    plain = item_table is not None or config.similarity == "l2"
    if plain or torch.float64 in (user_states.dtype, item_states.dtype):
        return item_action.item_log_prob(
            user_states, item_states, item_ids, item_targets, item_table, config
        ).float()
    return ItemLogProb.apply(
        user_states,
        item_states,
        item_ids.contiguous(),
        item_targets.contiguous(),
        config.similarity == "cosine",
        config.item_temperature,
    )


class ItemLogProb(torch.autograd.Function):
    """Log-probability of each trajectory's target among the batch's candidates, float32 [R]."""

    @staticmethod
    def forward(
        ctx: Any,
        user_states: torch.Tensor,
        item_states: torch.Tensor,
        item_ids: torch.Tensor,
        item_targets: torch.Tensor,
        cosine: bool,
        temperature: float,
    ) -> torch.Tensor:
        from .impl import triton

        users, items = (x.float().contiguous() for x in (user_states, item_states))
        with torch.autocast(users.device.type, enabled=False):
            log_prob, slope = triton.item_softmax(
                users, items, item_ids, item_targets, cosine, temperature
            )
        ctx.save_for_backward(users, items, slope)
        ctx.cosine, ctx.dtypes = cosine, (user_states.dtype, item_states.dtype)
        return log_prob

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from .impl import triton

        users, items, slope = ctx.saved_tensors
        with torch.autocast(users.device.type, enabled=False):
            pull = grad[:, None] * slope  # [R, M], the gradient of the products
            found: list[torch.Tensor | None] = [None, None]
            for side, (coefficients, others, own) in enumerate(
                ((pull, items, users), (pull.T, users, items))
            ):
                if ctx.needs_input_grad[side]:
                    through = torch.mm(coefficients, others)
                    dtype = ctx.dtypes[side]
                    if ctx.cosine:
                        found[side] = triton.without_parallel(through, own, dtype)
                    else:
                        found[side] = through.to(dtype)
        return (*found, None, None, None, None)

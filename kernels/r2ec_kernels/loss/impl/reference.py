"""The terms of the RecPO loss as their equations, one trajectory after another, in any dtype."""

from collections.abc import Sequence

import torch

from ..config import RecPOLossConfig
from .common import Actions, Normalizers, StepCounts, StoredLogProbs, bounded, normalizers


def similarity_matrix(queries: torch.Tensor, items: torch.Tensor, similarity: str) -> torch.Tensor:
    """[R, d], [M, d] -> [R, M]."""
    if similarity == "cosine":
        queries, items = _unit(queries), _unit(items)
    if similarity == "l2":
        return -(queries[:, None] - items[None]).norm(dim=-1)
    return queries @ items.T


def item_log_prob(
    user_states: torch.Tensor,
    item_states: torch.Tensor,
    item_ids: torch.Tensor,
    item_targets: torch.Tensor,
    item_table: torch.Tensor | None,
    config: RecPOLossConfig,
) -> torch.Tensor:
    """Log-probability of each trajectory's target among its candidates, [B*G].

    In-batch: the rows of ``item_states`` without the other rows that carry the target's id.
    Catalog: every id once; a row of the batch stands for its id, else the table's row.
    """
    if not item_targets.shape[0]:
        return user_states.sum(1)  # of no trajectory
    group = user_states.shape[0] // item_targets.shape[0]
    out = []
    for r in range(user_states.shape[0]):
        target = int(item_targets[r // group])
        rows = [target]
        seen = {int(item_ids[target])}
        for m in range(item_ids.shape[0]):
            item = int(item_ids[m])
            repeated = item in seen if item_table is not None else item == int(item_ids[target])
            if m != target and not repeated:
                rows.append(m)
                seen.add(item)
        candidates = item_states[rows]
        if item_table is not None:
            stale = [i for i in range(item_table.shape[0]) if i not in seen]
            candidates = torch.cat([candidates, item_table[stale].to(candidates.dtype)])
        scores = similarity_matrix(user_states[r : r + 1], candidates, config.similarity)[0]
        out.append(torch.log_softmax(scores / config.item_temperature, dim=-1)[0])
    return torch.stack(out)


def clipped(ratio: torch.Tensor, advantage: torch.Tensor, config: RecPOLossConfig) -> torch.Tensor:
    """l(r, A) = min(r A, clip(r) A), docs/method.md#clip."""
    low, high = 1 - config.epsilon, 1 + config.epsilon_high
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def objective(
    log_prob: torch.Tensor,
    item_log_prob: torch.Tensor,
    actions: Actions,
    counts: StepCounts,
    config: RecPOLossConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token loss, item loss) of a call."""
    counted, rows = actions.targets >= 0, actions.trajectory
    step = normalizers(counts, counted.sum(), item_log_prob.shape[0], config)
    advantages = actions.advantages.to(log_prob.dtype)
    stored = actions.stored.constants(log_prob.dtype)
    tokens = token_loss(log_prob, counted, rows, advantages, stored, step, config)
    old = actions.old_items
    if old is not None:
        old = old.to(item_log_prob.dtype)
    lengths = [int((counted & (rows == i)).sum()) for i in range(len(advantages))]
    items = item_loss(item_log_prob, old, advantages, actions.best, lengths, step, config)
    return tokens, items


def token_loss(
    log_prob: torch.Tensor,
    counted: torch.Tensor,
    trajectory: torch.Tensor,
    advantages: torch.Tensor,
    stored: StoredLogProbs,
    step: Normalizers,
    config: RecPOLossConfig,
) -> torch.Tensor:
    """Loss of the reasoning tokens, one trajectory after another."""
    if not advantages.shape[0]:
        return log_prob.sum()  # of no token
    old = log_prob.detach() if stored.old is None else stored.old
    terms = []
    for i, advantage in enumerate(advantages):
        own = (trajectory == i) & counted
        length = max(int(own.sum()), 1)
        log_ratio = log_prob[own] - old[own]
        if config.ratio_level == "sequence":
            log_ratio = (log_ratio.sum() / length).expand_as(log_ratio)
        loss = -clipped(log_ratio.exp(), advantage, config)
        if stored.sampler is not None:
            loss = loss * importance_ratio(old[own], stored.sampler[own], config)
        if config.kl_weight and stored.ref is not None:
            gap = stored.ref[own] - log_prob[own]
            loss = loss + config.kl_weight * (gap.exp() - gap - 1)
        terms.append(loss.sum() / _divisor(length, step, config))
    return torch.stack(terms).sum()


def importance_ratio(
    old: torch.Tensor, sampler: torch.Tensor, config: RecPOLossConfig
) -> torch.Tensor:
    """Correction of the tokens [n] of one trajectory: [n], or [] of the trajectory as a whole."""
    difference = old - sampler
    difference = torch.where(difference.isnan(), 0.0, difference)
    if config.importance_sampling_mode.startswith("sequence"):
        difference = difference.sum()
    return bounded(difference.exp(), config)


def item_loss(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor | None,
    advantages: torch.Tensor,
    best: torch.Tensor,
    lengths: Sequence[int],
    step: Normalizers,
    config: RecPOLossConfig,
) -> torch.Tensor:
    """Loss of the item actions: of each best trajectory one more action after its tokens."""
    old = log_prob.detach() if old_log_prob is None else old_log_prob
    terms = [log_prob.sum() * 0]
    for i, length in enumerate(lengths):
        if best[i]:
            ratio = (log_prob[i] - old[i]).exp()
            term = -clipped(ratio, advantages[i].to(ratio.dtype), config)
            terms.append(term / _divisor(max(length, 1), step, config))
    return torch.stack(terms).sum()


def _divisor(length: int, step: Normalizers, config: RecPOLossConfig) -> float | torch.Tensor:
    """What the losses of a trajectory's actions are divided by; ``length``: its tokens."""
    if config.reduction == "token":
        return step.tokens
    if config.reduction == "sequence":
        return length * step.trajectories
    if config.reduction == "constant":
        assert config.max_completion_length is not None  # the config asks for it
        return config.max_completion_length * step.trajectories
    return step.trajectories


def _unit(x: torch.Tensor) -> torch.Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)

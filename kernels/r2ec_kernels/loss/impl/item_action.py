"""The item action: log-probability of each trajectory's target among its candidate items."""

from typing import Any

import torch

from ..config import RecPOLossConfig

TILE_ELEMENTS = 1 << 19  # scores of a block: 2 MiB in float32
BLOCK_BYTES = 8 << 20  # rows of a block


def item_log_prob(
    user_states: torch.Tensor,
    item_states: torch.Tensor,
    item_ids: torch.Tensor,
    item_targets: torch.Tensor,
    item_table: torch.Tensor | None,
    config: RecPOLossConfig,
) -> torch.Tensor:
    """[R], R = B*G; float32, or float64 for float64 states.

    The candidates are the rows of ``item_states`` without the other rows that carry the target's
    id. With ``item_table`` they are the whole catalog, each id once: a row of the batch stands for
    its id, the table's row for any other.
    """
    dtype = torch.promote_types(user_states.dtype, item_states.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    users, items = user_states.to(dtype), item_states.to(dtype)
    group = users.shape[0] // max(item_targets.shape[0], 1)
    scores = similarity_matrix(users, items, config.similarity) / config.item_temperature
    keep = candidate_mask(item_ids, item_targets, item_table is not None)
    scores = scores.masked_fill(~keep.repeat_interleave(group, 0), -torch.inf)
    lse = scores.logsumexp(1)
    if item_table is not None:
        needed = torch.is_grad_enabled() and users.requires_grad
        rest = CatalogLSE.apply(
            users, item_table, item_ids, config.similarity, config.item_temperature, needed
        )
        lse = torch.logaddexp(lse, rest)
    target = item_targets.repeat_interleave(group)
    return scores.gather(1, target[:, None])[:, 0] - lse


def similarity_matrix(queries: torch.Tensor, items: torch.Tensor, similarity: str) -> torch.Tensor:
    """[R, d], [M, d] -> [R, M]; the gradient of a zero vector's norm is 0."""
    if similarity == "l2":
        return -torch.cdist(queries, items, compute_mode="donot_use_mm_for_euclid_dist")
    if similarity == "cosine":
        queries, items = unit(queries), unit(items)
    return queries @ items.T


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows divided by their norm; a zero row stays zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def candidate_mask(
    item_ids: torch.Tensor, item_targets: torch.Tensor, each_once: bool
) -> torch.Tensor:
    """Which rows of the batch's items are candidates of each user, bool [B, M].

    The other rows that carry the target's id are not; with ``each_once`` neither is any other
    repeated row.
    """
    rows = torch.arange(item_ids.shape[0], device=item_ids.device)
    keep = item_ids[None] != item_ids[item_targets][:, None]
    if each_once:
        same = item_ids[:, None] == item_ids[None]
        keep = keep & ~(same & (rows[None] < rows[:, None])).any(1)
    return keep | (rows[None] == item_targets[:, None])


class CatalogLSE(torch.autograd.Function):
    """Log-sum-exp of each query's scores over a table's rows, without some of them, [R].

    One pass in blocks also accumulates the softmax mean of d score / d query, which backward
    scales. No gradient flows to the table. Memory: a block of scores and [R, d].
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,  # [R, d]
        table: torch.Tensor,  # [N, d]
        excluded: torch.Tensor,  # int64, ids of rows that do not take part
        similarity: str,
        temperature: float,
        needed: bool,
    ) -> torch.Tensor:
        compiling = torch.compiler.is_compiling()
        run = torch.ops.r2ec_kernels.catalog_lse if compiling else catalog_lse
        with torch.autocast(queries.device.type, enabled=False):
            lse, jacobian = run(queries, table, excluded, similarity, temperature, needed)
        ctx.save_for_backward(jacobian)
        return lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (jacobian,) = ctx.saved_tensors
        return grad[:, None] * jacobian, None, None, None, None, None


def catalog_lse(
    queries: torch.Tensor,
    table: torch.Tensor,
    excluded: torch.Tensor,
    similarity: str,
    temperature: float,
    jacobian: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lse [R], d lse / d query [R, d], or [0, d] if not asked for)."""
    num, d = queries.shape
    user = unit(queries) if similarity == "cosine" else queries
    square = user.square().sum(1, keepdim=True)
    m = user.new_full((num,), torch.finfo(user.dtype).min)
    l, pull = torch.zeros_like(m), torch.zeros_like(m)
    acc = user.new_zeros(num if jacobian else 0, d)  # sum e d(score)/d(dot) x
    width = max(512, min(TILE_ELEMENTS // max(num, 1), BLOCK_BYTES // (d * user.itemsize)))
    for start in range(0, table.shape[0], width):
        block = table[start : start + width].to(user.dtype)
        if similarity == "cosine":
            block = unit(block)
        scores = user @ block.T
        if similarity == "l2":
            distance = (square + block.square().sum(1) - 2 * scores).clamp_(min=0).sqrt_()
            scores = -distance
        scores /= temperature
        here = excluded[(excluded >= start) & (excluded < start + block.shape[0])]
        scores[:, here - start] = -torch.inf
        above = torch.maximum(m, scores.amax(1))
        rescale = (m - above).exp()
        m = above
        e = scores.sub_(above[:, None]).exp_()
        l = l * rescale + e.sum(1)
        if not jacobian:
            continue
        if similarity == "l2":
            e = torch.where(distance > 0, e / distance, 0.0)
            pull = pull * rescale + e.sum(1)
        acc.mul_(rescale[:, None]).addmm_(e, block)
    lse = m + l.log()
    if not jacobian:
        return lse, acc
    if similarity == "l2":
        acc -= pull[:, None] * user
    mean = acc.div_((l * temperature)[:, None])
    if similarity == "cosine":
        # through the user's own normalisation: the component along it does not count
        norm = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
        mean -= (mean * user).sum(1, keepdim=True) * user
        mean = torch.where(norm > 0, mean / norm, mean)
    return lse, mean

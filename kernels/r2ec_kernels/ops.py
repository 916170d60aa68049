"""Schemas and fakes of the ops. Implementations are imported when an op first runs."""

from typing import Any

import torch
from torch import Tensor, library

from ._exact.excluded import TensorExclude

OPS = library.Library("r2ec_kernels", "DEF")


def _pair(exclude: Tensor | None, offsets: Tensor | None) -> TensorExclude:
    """The public form of the two tensors that an op takes for its exclusions."""
    return exclude if exclude is None or offsets is None else (exclude, offsets)


# ---- topk --------------------------------------------------------------------------------------

OPS.define(
    "item_topk(Tensor queries, Tensor items, SymInt k, str similarity, float temperature, "
    "Tensor? exclude, Tensor? exclude_offsets, Tensor? include, str impl) -> (Tensor, Tensor)"
)


@library.impl(OPS, "item_topk", "CompositeExplicitAutograd")
def _item_topk(
    queries: Tensor,
    items: Tensor,
    k: int,
    similarity: str,
    temperature: float,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    include: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    from .topk.api import run_item_topk

    pair = _pair(exclude, exclude_offsets)
    return run_item_topk(queries, items, k, similarity, temperature, pair, include, impl)


@library.register_fake("r2ec_kernels::item_topk", lib=OPS)
def _item_topk_fake(
    queries: Tensor,
    items: Tensor,
    k: int,
    similarity: str,
    temperature: float,
    exclude: Tensor | None,
    exclude_offsets: Tensor | None,
    include: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(
        shape, dtype=torch.int64
    )


# ---- rank, logprob, loss -----------------------------------------------------------------------

_HEAD = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias"
_SETTINGS = (
    "float? softcap, float temperature, bool entropy, ScalarType compute, str impl, bool every_row"
)

OPS.define(
    f"linear_logprob_forward({_HEAD}, Tensor? differentiated, str mode, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
OPS.define(
    f"linear_logprob_backward({_HEAD}, Tensor[] forward, Tensor? grad_log_prob, "
    f"Tensor? grad_entropy, bool[3] needed, {_SETTINGS}) -> (Tensor, Tensor, Tensor)"
)
OPS.define(
    "catalog_lse(Tensor queries, Tensor table, Tensor excluded, str similarity, "
    "float temperature, bool jacobian) -> (Tensor, Tensor)"
)
OPS.define(
    "target_stats(Tensor queries, Tensor items, Tensor targets, str similarity, float temperature, "
    "Tensor? exclude, Tensor? exclude_offsets, Tensor? include, str impl) -> (Tensor, Tensor)"
)


@library.impl(OPS, "linear_logprob_forward", "CompositeExplicitAutograd")
def _logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    differentiated: Tensor | None,
    mode: str,
    *settings: Any,
) -> tuple[Tensor, ...]:
    from .logprob.function import implementation
    from .logprob.impl.common import HeadSettings

    head = HeadSettings(*settings)
    run = implementation(head.impl).head_forward
    return tuple(run(hidden, weight, targets, bias, differentiated, mode, head))


@library.register_fake("r2ec_kernels::linear_logprob_forward", lib=OPS)
def _logprob_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    differentiated: Tensor | None,
    mode: str,
    *settings: Any,
) -> tuple[Tensor, ...]:
    from .logprob.impl.common import HeadSettings, empty_forward

    return tuple(empty_forward(hidden, weight, mode, HeadSettings(*settings)))


@library.impl(OPS, "linear_logprob_backward", "CompositeExplicitAutograd")
def _logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    forward: list[Tensor],
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    needed: list[bool],
    *settings: Any,
) -> tuple[Tensor, ...]:
    from .logprob.function import implementation
    from .logprob.impl.common import HeadForward, HeadSettings

    head = HeadSettings(*settings)
    grads = implementation(head.impl).head_backward(
        hidden,
        weight,
        targets,
        bias,
        HeadForward(*forward),
        grad_log_prob,
        grad_entropy,
        tuple(needed),
        head,
    )
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)


@library.register_fake("r2ec_kernels::linear_logprob_backward", lib=OPS)
def _logprob_backward_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    forward: list[Tensor],
    grad_log_prob: Tensor | None,
    grad_entropy: Tensor | None,
    needed: list[bool],
    *settings: Any,
) -> tuple[Tensor, ...]:
    inputs = zip((hidden, weight, bias), needed, strict=True)
    return tuple(
        hidden.new_empty(0) if x is None or not wanted else torch.empty_like(x)
        for x, wanted in inputs
    )


@library.impl(OPS, "catalog_lse", "CompositeExplicitAutograd")
def _catalog_lse(
    queries: Tensor,
    table: Tensor,
    excluded: Tensor,
    similarity: str,
    temperature: float,
    jacobian: bool,
) -> tuple[Tensor, Tensor]:
    from .loss.impl.item_action import catalog_lse

    return catalog_lse(queries, table, excluded, similarity, temperature, jacobian)


@library.register_fake("r2ec_kernels::catalog_lse", lib=OPS)
def _catalog_lse_fake(
    queries: Tensor,
    table: Tensor,
    excluded: Tensor,
    similarity: str,
    temperature: float,
    jacobian: bool,
) -> tuple[Tensor, Tensor]:
    num, d = queries.shape
    return queries.new_empty(num), queries.new_empty(num if jacobian else 0, d)


@library.impl(OPS, "target_stats", "CompositeExplicitAutograd")
def _target_stats(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    similarity: str,
    temperature: float,
    exclude: Tensor | None,
    offsets: Tensor | None,
    include: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    from .rank.api import run_target_stats

    pair = _pair(exclude, offsets)
    return run_target_stats(queries, items, targets, similarity, temperature, pair, include, impl)


@library.register_fake("r2ec_kernels::target_stats", lib=OPS)
def _target_stats_fake(
    queries: Tensor,
    items: Tensor,
    targets: Tensor,
    similarity: str,
    temperature: float,
    exclude: Tensor | None,
    offsets: Tensor | None,
    include: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    rank = queries.new_empty(queries.shape[0], dtype=torch.int64)
    return rank, queries.new_empty(queries.shape[0], dtype=torch.float32)

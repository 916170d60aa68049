"""Attention of one new token a row over rows that come and go (`RowCache`).

The known prefix meets all rows' queries in one product; each row's own keys are a batch product, as
long as the longest row, with what lies behind a row's end masked.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from r2ec_fast.rollout.continuous.cache import RowCache

NAME = "r2ec_rows"


def register() -> None:
    """Make the implementation known to transformers (idempotent)."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, row_attention)


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    row_cache: RowCache | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """query [n, H, 1, D], key and value [n, H_kv, 1, D] of the new tokens, which the cache has
    already; returns [n, 1, H, D] and None (no attention weights)."""
    if row_cache is None:
        raise ValueError(f"{NAME} attention needs the keyword argument row_cache")
    if attention_mask is not None or dropout:
        raise ValueError(f"{NAME} attention takes no attention_mask and no dropout")
    layer = cast(int, module.layer_idx)
    keys, values = row_cache.rows(layer)  # [n, H_kv, L, D]
    rows, heads_kv = keys.shape[:2]
    grouped = (query[:, :, 0] * scaling).view(rows, heads_kv, -1, query.shape[-1])
    scores = grouped @ keys.transpose(-1, -2)  # [n, H_kv, rep, L]
    known = row_cache.num_known
    if row_cache.known is not None:
        prefix_k, prefix_v = (one[0] for one in row_cache.known.states[layer])  # [H_kv, P, D]
        by_head = grouped.transpose(0, 1).flatten(1, 2)  # [H_kv, n * rep, D]
        shared = (by_head @ prefix_k.transpose(-1, -2)).unflatten(1, (rows, -1)).transpose(0, 1)
        scores = torch.cat([shared, scores], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bias = row_cache.bias(sliding_window, scores)
    if bias is not None:
        scores = scores + bias
    kind = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=kind).to(values.dtype)
    out = weights[..., known:] @ values
    if row_cache.known is not None:
        by_head = weights[..., :known].transpose(0, 1).flatten(1, 2)
        out = out + (by_head @ prefix_v).unflatten(1, (rows, -1)).transpose(0, 1)
    return out.reshape(rows, 1, -1, out.shape[-1]), None

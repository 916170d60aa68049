"""Attention for shared-prompt decoding, as a transformers attention implementation.

All rows of one prompt, and all query heads of one key/value head, meet the prompt's keys in ONE
product: [G * rep, D] x [D, P]. Nothing is repeated, so the prompt's cache is read once a step. The
suffix scores are laid beside the prefix scores and one softmax covers both.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r2ec_fast.rollout.shared_prompt.cache import SharedPromptCache

NAME = "r2ec_rollout"
QUERY_BLOCK = 256


def register() -> None:
    """Make the implementation known to transformers (idempotent)."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, rollout_attention)


def rollout_attention(
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
    rollout_cache: SharedPromptCache | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Attention of one prompt over itself (prefill), or of one new token a row over the cache.

    Args:
        query: [n, H, q, D]; key, value: [n, H_kv, q, D], the new tokens only.
        rollout_cache: arrives through the keyword arguments of the model's forward.

    Returns:
        [n, q, H, D] and None (no attention weights).
    """
    if rollout_cache is None:
        raise ValueError(
            f"{NAME} attention needs the keyword argument rollout_cache; does "
            f"{type(module).__name__} hand its keyword arguments on?"
        )
    if attention_mask is not None or dropout:
        raise ValueError(f"{NAME} attention takes no attention_mask and no dropout")
    if rollout_cache.suffix_length is None:
        return _prefill(query, key, value, scaling, softcap, sliding_window), None
    layer = cast(int, module.layer_idx)
    return _decode(rollout_cache, layer, query, scaling, softcap, sliding_window), None


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Causal attention of one prompt over itself: [1, H, P, D] -> [1, P, H, D].

    The queries may be those of its last tokens alone (behind a known prefix).
    """
    before = key.shape[2] - query.shape[2]
    if before:  # the missing queries are few: laid in front, and dropped again
        query = F.pad(query, (0, 0, before, 0))
        return _prefill(query, key, value, scaling, softcap, window)[:, before:]
    length = query.shape[2]
    if softcap is None and (window is None or length <= window):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=length > 1, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)
    heads_kv, dim = key.shape[1], query.shape[3]
    # [H_kv, rep, P, D]: query heads of one key/value head together
    grouped = query[0].view(heads_kv, -1, length, dim)
    out = torch.empty_like(grouped)
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        start = 0 if window is None else max(0, first - window + 1)
        keys, values = key[0, :, None, start:last], value[0, :, None, start:last]
        scores = (grouped[:, :, first:last] * scaling) @ keys.transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = (
            torch.arange(first, last, device=key.device)[:, None]
            - torch.arange(start, last, device=key.device)[None]
        )
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        scores.masked_fill_(hidden, -torch.inf)
        out[:, :, first:last] = _softmax(scores).to(values.dtype) @ values
    return out.view(1, -1, length, dim).transpose(1, 2)


def _decode(
    cache: SharedPromptCache,
    layer: int,
    query: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """One new token a row: [n, H, 1, D] -> [n, 1, H, D]."""
    prefix_k, prefix_v = cache.prefix[layer]
    used = cache.suffix_length
    suffix_k, suffix_v = (stored[:, :, :used] for stored in cache.suffix[layer])
    prompts, heads_kv, longest, dim = prefix_k.shape
    samples, rows = cache.num_samples, query.shape[0]
    query = query[:, :, 0] * scaling
    if cache.slots is not None:
        spread = query.new_zeros(prompts * samples, *query.shape[1:])
        spread[cache.slots] = query
        query = spread
    by_slot = query.view(prompts * samples, heads_kv, -1, dim)
    rep = by_slot.shape[2]

    def to_prompt(x: Tensor) -> Tensor:  # [B * G, H_kv, rep, c] -> [B, H_kv, G * rep, c]
        x = x.view(prompts, samples, heads_kv, rep, -1).transpose(1, 2)
        return x.reshape(prompts, heads_kv, samples * rep, -1)

    def to_slot(x: Tensor) -> Tensor:  # [B, H_kv, G * rep, c] -> [B * G, H_kv, rep, c]
        x = x.unflatten(2, (samples, rep)).transpose(1, 2)
        return x.reshape(prompts * samples, heads_kv, rep, -1)

    scores = torch.cat(
        [
            to_prompt(by_slot) @ prefix_k.transpose(-1, -2),
            to_prompt(by_slot @ suffix_k.transpose(-1, -2)),
        ],
        dim=-1,
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bias = cache.bias(window, rep)
    if bias is not None:
        scores = scores + bias
    weights = _softmax(scores).to(prefix_v.dtype)
    out = to_slot(weights[..., :longest] @ prefix_v) + to_slot(weights[..., longest:]) @ suffix_v
    if cache.slots is not None:
        out = out[cache.slots]
    return out.reshape(rows, 1, -1, dim)


def _softmax(scores: Tensor) -> Tensor:
    # half precision scores are normalised in float32; float64 stays float64
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))

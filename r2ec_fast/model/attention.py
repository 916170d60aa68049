"""Attention over packed rows: several sequences, and shared prompts, in one row without padding.

Registered with transformers as ``"r2ec_varlen"``. Sequence ``s`` owns the queries
``cu_seq_lens_q[s]:cu_seq_lens_q[s+1]`` and the keys
``kv_index[cu_seq_lens_k[s]:cu_seq_lens_k[s+1]]`` (rows of the same packed K/V); causal, aligned
bottom-right, so that a completion sees the whole prompt it shares and its own past. One function,
:func:`choose_path`, picks how it is computed:

========  =============================  ==============================================
path      when                           computed by
========  =============================  ==============================================
flash     CUDA, fp16/bf16, flash-attn    ``flash_attn_varlen_func`` on gathered K/V
flex      CUDA otherwise                 compiled ``flex_attention`` with a block mask
sdpa      everywhere else                ``scaled_dot_product_attention``, a sequence a call
========  =============================  ==============================================
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from r2ec_fast.packing.packer import PackedBatch

VARLEN = "r2ec_varlen"


@dataclass
class VarlenLayout:
    """Which keys each sequence of a packed row may see; made once a batch, used by every layer.

    ``segments[s]`` is the number of tokens of sequence ``s``. ``key_segments`` are those of the
    packed keys, which may hold a known prefix besides; the keys of ``s`` are the parts ``keys[s]``
    of them, the last of which is its own.
    """

    cu_seq_lens_q: torch.Tensor
    cu_seq_lens_k: torch.Tensor
    max_length_q: int
    max_length_k: int
    kv_index: torch.Tensor | None
    segments: list[int] = field(default_factory=list)
    key_segments: list[int] = field(default_factory=list)
    keys: list[tuple[int, ...]] = field(default_factory=list)
    block_masks: dict[int | None, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.key_segments = self.key_segments or self.segments

    @classmethod
    def from_batch(cls, batch: PackedBatch) -> VarlenLayout:
        """The layout of ``batch``.

        Raises ValueError where a sequence's keys are not a run of whole sequences that ends with
        the sequence itself.
        """
        bounds = batch.cu_seq_lens_q.tolist()
        start_of = {start: s for s, start in enumerate(bounds[:-1])}
        count = len(bounds) - 1
        keys: list[tuple[int, ...]] = [(s,) for s in range(count)]
        if batch.kv_index is not None:
            index, k_bounds = batch.kv_index.tolist(), batch.cu_seq_lens_k.tolist()
            for s in range(count):
                keys[s] = _whole_sequences(index, k_bounds[s], k_bounds[s + 1], start_of, bounds, s)
        segments = [b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        return cls(
            cu_seq_lens_q=batch.cu_seq_lens_q,
            cu_seq_lens_k=batch.cu_seq_lens_k,
            max_length_q=batch.max_length_q,
            max_length_k=batch.max_length_k,
            kv_index=batch.kv_index,
            segments=segments,
            keys=keys,
        )

    def behind(self, known: int) -> VarlenLayout:
        """The layout without the queries of its first ``known`` tokens, whose keys are known: all
        of the first sequence, or the beginning of it."""
        rest = self.segments[0] - known
        if rest:  # its keys are then two parts, and all others count one more
            return replace(
                self,
                cu_seq_lens_q=(self.cu_seq_lens_q - known).clamp(min=0),
                segments=[rest, *self.segments[1:]],
                key_segments=[known, rest, *self.key_segments[1:]],
                keys=[(0, 1), *(tuple(p + 1 for p in parts) for parts in self.keys[1:])],
                block_masks={},
            )
        return replace(
            self,
            cu_seq_lens_q=self.cu_seq_lens_q[1:] - known,
            cu_seq_lens_k=self.cu_seq_lens_k[1:] - known,
            kv_index=None if self.kv_index is None else self.kv_index[known:],
            segments=self.segments[1:],
            keys=self.keys[1:],
            block_masks={},
        )

    def to(self, device: torch.device) -> VarlenLayout:
        """The same layout with its tensors on ``device``."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in ("cu_seq_lens_q", "cu_seq_lens_k", "kv_index")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, block_masks={}, **moved)


def _whole_sequences(
    index: list[int], at: int, end: int, start_of: dict[int, int], bounds: list[int], own: int
) -> tuple[int, ...]:
    found = []
    while at < end:
        s = start_of.get(index[at])
        length = 0 if s is None else bounds[s + 1] - bounds[s]
        if s is None or length == 0 or index[at + length - 1] != bounds[s + 1] - 1:
            raise ValueError(
                f"kv_index: expected whole sequences, got a part of one in sequence {own}"
            )
        found.append(s)
        at += length
    if not found or found[-1] != own:
        raise ValueError(f"kv_index: sequence {own} must end with its own rows, got {found}")
    return tuple(found)


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def choose_path(query: torch.Tensor) -> str:
    """``"flash"``, ``"flex"`` or ``"sdpa"`` for queries [1, H, T, D]; see the module's table."""
    if query.device.type != "cuda":
        return "sdpa"
    half = query.dtype in (torch.float16, torch.bfloat16)
    return "flash" if half and _has_flash_attn() else "flex"


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    varlen_layout: VarlenLayout | None = None,
    **_: object,  # transformers passes every keyword of the model's forward
) -> tuple[torch.Tensor, None]:
    """Attention of a packed row, in the signature of transformers' attention functions.

    query [1, H, T, D], key and value [1, H_kv, T', D], T' > T behind a known prefix; returns
    ([1, T, H, D], None).
    ``sliding_window`` w lets a token see itself and the w - 1 before it; ``softcap`` c maps a
    score x to c·tanh(x / c).
    """
    if varlen_layout is None:
        raise ValueError(f"{VARLEN!r} needs varlen_layout; call the model through R2ecModel")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    path = {"flash": _flash, "flex": _flex, "sdpa": _sdpa}[choose_path(query)]
    out = path(query, key, value, varlen_layout, scale, dropout, sliding_window, softcap)
    return out, None


def _sdpa(query, key, value, layout, scale, dropout, window, softcap):
    # split once: the gradient of a split is one concatenation, and a shared prompt is never copied
    queries = query.split(layout.segments, dim=2)
    keys, values = key.split(layout.key_segments, dim=2), value.split(layout.key_segments, dim=2)
    out = []
    for q, parts, s in zip(queries, layout.keys, range(len(queries)), strict=True):
        k = keys[s] if len(parts) == 1 else torch.cat([keys[p] for p in parts], dim=2)
        v = values[s] if len(parts) == 1 else torch.cat([values[p] for p in parts], dim=2)
        out.append(_one_sequence(q, k, v, scale, dropout, window, softcap))
    return torch.cat(out, dim=2).transpose(1, 2)


def _one_sequence(q, k, v, scale, dropout, window, softcap):
    length_q, length_k = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    windowed = window is not None and length_k > window
    before = length_k - length_q
    padded = before < length_q and not torch.is_grad_enabled()
    if softcap is None and not windowed and (padded or not before):
        # a causal product of L^2 / 2 scores beats a masked one of length_q * L: the missing queries
        # of the keys before are laid in front, and dropped again (not in training, where the masked
        # product's gradient is a little more accurate)
        out = F.scaled_dot_product_attention(
            F.pad(q, (0, 0, before, 0)) if before else q,
            k, v, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=gqa,
        )  # fmt: skip
        return out[:, :, before:]
    mask = _causal_mask(length_q, length_k, window if windowed else None, q.device)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout, enable_gqa=gqa
        )
    if gqa:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = softcap * torch.tanh((q @ k.mT) * (scale / softcap))
    probs = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return F.dropout(probs, dropout) @ v


def _causal_mask(
    length_q: int, length_k: int, window: int | None, device: torch.device
) -> torch.Tensor:
    # bottom-right: the last query sees the last key
    age = torch.arange(length_k - length_q, length_k, device=device)[:, None] - torch.arange(
        length_k, device=device
    )
    return (age >= 0) if window is None else (age >= 0) & (age < window)


def _flash(query, key, value, layout, scale, dropout, window, softcap):
    from flash_attn import flash_attn_varlen_func

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    if layout.kv_index is not None:
        k, v = k[layout.kv_index], v[layout.kv_index]
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        layout.cu_seq_lens_q,
        layout.cu_seq_lens_k,
        layout.max_length_q,
        layout.max_length_k,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out[None]


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(query, key, value, layout, scale, dropout, window, softcap):
    from torch.nn.attention.flex_attention import flex_attention

    if dropout:
        raise ValueError(f"dropout: flex_attention has none, expected 0, got {dropout}")
    if layout.kv_index is not None:
        key, value = key[:, :, layout.kv_index], value[:, :, layout.kv_index]
    if window not in layout.block_masks:
        layout.block_masks[window] = _block_mask(layout, window, query.device)
    score_mod = None
    if softcap is not None:

        def score_mod(score, b, h, q_idx, kv_idx):
            return softcap * torch.tanh(score / softcap)

    # uncompiled it is a correct, materialising CPU path: what the tests compare with
    attend = _compiled_flex() if query.device.type == "cuda" else flex_attention
    out = attend(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=layout.block_masks[window],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


def _block_mask(layout: VarlenLayout, window: int | None, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    def owner_and_position(bounds: torch.Tensor, end_at: torch.Tensor):
        lengths = bounds.diff()
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        at = torch.arange(int(bounds[-1]), device=device) - bounds[:-1].long()[owner]
        return owner, at + (end_at - lengths)[owner]

    lengths_k = layout.cu_seq_lens_k.diff()
    q_owner, q_at = owner_and_position(layout.cu_seq_lens_q, lengths_k)
    k_owner, k_at = owner_and_position(layout.cu_seq_lens_k, lengths_k)

    def mask_mod(b, h, q_idx, kv_idx):
        age = q_at[q_idx] - k_at[kv_idx]
        seen = (q_owner[q_idx] == k_owner[kv_idx]) & (age >= 0)
        return seen if window is None else seen & (age < window)

    return create_block_mask(mask_mod, None, None, len(q_owner), len(k_owner), device=device)


def register() -> None:
    """Make ``"r2ec_varlen"`` known to transformers (idempotent); it builds no mask of its own."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen_attention)

"""The floor of a recommendation: a small ID-based SASRec and an item head, no language model.

Self-attentive sequential recommendation (Kang & McAuley 2018) in its usual size: two blocks, one
head, 64 columns, the last 50 items. Random weights: the time does not depend on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH = 50
WIDTH = 64
BLOCKS = 2


class Block(nn.Module):
    """Causal self-attention of one head, then two layers on each position."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, d]; mask bool [B, L, L], True where a position may look."""
        query, key, value = self.project(self.before(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        return x + self.outer(F.relu(self.inner(self.between(x))))


class SASRec(nn.Module):
    """User states from item ids; its item table is the embedding it reads with."""

    def __init__(self, items: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(items + 1, WIDTH, padding_idx=items)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)

    @property
    def table(self) -> Tensor:
        """The item table [N, d]."""
        return self.embed.weight[:-1]

    def rows(self, histories: Sequence[np.ndarray]) -> Tensor:
        """int64 [B, L]: the newest items, padded on the left."""
        longest = min(LENGTH, max(map(len, histories)))
        rows = torch.full((len(histories), longest), self.embed.padding_idx)
        for row, history in zip(rows, histories, strict=True):
            newest = history[-longest:]
            row[longest - len(newest) :] = torch.from_numpy(newest)
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, L] -> state of the last position [B, d]."""
        length = ids.shape[1]
        known = ids != self.embed.padding_idx
        at = torch.arange(length - 1, -1, -1, device=ids.device)  # counted from the newest
        x = self.embed(ids) + self.position(at)
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=ids.device)
        mask = (causal & known[:, None]) | itself  # padding sees itself: no empty row
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x[:, -1])

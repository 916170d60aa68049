"""What all prompts begin with, computed once: keys and values of a template's first tokens.

Every user prompt opens with the same chat frame and instruction. While the weights stay, so do the
keys and values of those tokens; a server computes them once and each request only what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from r2ec_fast.packing.ragged import Ragged, Rows, common_prefix


class KnownPrefix(Cache):
    """Keys and values of ``tokens``, for one state of a model's weights.

    `R2ecModel.known_prefix` makes one: as the cache of a pass over the tokens it takes up their
    keys and values. As the cache of a pass over the tokens that follow it lays its keys
    and values before theirs and keeps nothing. It does not notice when weights change: make
    another then, as an item table is encoded anew.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(layers=[])
        if not len(tokens):
            raise ValueError("tokens: expected at least one, got none")
        self.tokens = list(tokens)
        self.states: list[tuple[Tensor, Tensor]] = []  # [1, H_kv, P, D] each, a pair a layer
        self.complete = False  # until the pass over the tokens has been made

    def __len__(self) -> int:
        return len(self.tokens)

    def begins(self, rows: Rows) -> bool:
        """Whether every row begins with the tokens and goes on."""
        rows, length = Ragged.of(rows), len(self.tokens)
        if not len(rows):
            return True
        goes_on = rows.lengths.min() > length
        return bool(
            goes_on and common_prefix(rows) >= length and rows[0][:length].tolist() == self.tokens
        )

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """The prefix's keys and values of a layer, and behind them the new ones [1, H_kv, T, D]."""
        if not self.complete:
            self.states.append((key_states, value_states))
            return key_states, value_states
        keys, values = self.states[layer_idx]
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

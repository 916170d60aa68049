"""The cache of rows that come and go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from r2ec_fast.model.prefix_cache import KnownPrefix


class Prefill(Cache):
    """The cache of one pass over new prompts: lays what is known before their keys and values, as
    `KnownPrefix` does, and keeps theirs."""

    def __init__(self, known: KnownPrefix | None) -> None:
        super().__init__(layers=[])
        self.known = known
        self.states: list[tuple[Tensor, Tensor]] = []  # [1, H_kv, T, D] each, a pair a layer

    @property
    def complete(self) -> bool:
        """Whether something is known (what `R2ecModel.forward` asks a prefix)."""
        return self.known is not None

    def __len__(self) -> int:
        return 0 if self.known is None else len(self.known)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **_: object
    ) -> tuple[Tensor, Tensor]:
        self.states.append((key_states, value_states))
        if self.known is None:
            return key_states, value_states
        return self.known.update(key_states, value_states, layer_idx)


class RowCache(Cache):
    """Keys and values of n rows of different lengths, behind one known prefix of P tokens.

    Rows are kept side by side: rows 0..n-1 are alive, and the last one takes the place of one that
    leaves. Per layer: keys and values [capacity, H_kv, room, D], which grow as they must; row r
    uses its first ``lengths[r]`` places.

    Args:
        known: what all rows begin with; None: nothing.
    """

    def __init__(self, known: KnownPrefix | None) -> None:
        super().__init__(layers=[])
        self.known = known
        self.layers_kept: list[tuple[Tensor, Tensor]] = []
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self._bias: dict[int | None, Tensor | None] = {}

    @property
    def num_known(self) -> int:
        return 0 if self.known is None else len(self.known)

    @property
    def longest(self) -> int:
        """Places of the longest row, the newest token's included."""
        return int(self.lengths.max()) if len(self.lengths) else 0

    def join(
        self, prefill: Prefill, starts: Sequence[int], stops: Sequence[int], room: int
    ) -> None:
        """Add rows whose keys and values are tokens ``starts[i]`` .. ``stops[i] - 1`` of a pass.

        ``room``: places that the longest of them may come to need.
        """
        before, new = len(self.lengths), len(starts)
        lengths = torch.tensor([b - a for a, b in zip(starts, stops, strict=True)])
        for layer, pair in enumerate(prefill.states):
            if layer == len(self.layers_kept):
                empty = pair[0].new_empty((0, pair[0].shape[1], 0, pair[0].shape[3]))
                self.layers_kept.append((empty, empty.clone()))
            kept = self.layers_kept[layer]
            self.layers_kept[layer] = tuple(  # type: ignore[assignment]
                _grown(one, before, before + new, room) for one in kept
            )
            for stored, states in zip(self.layers_kept[layer], pair, strict=True):
                for row, (start, stop) in enumerate(zip(starts, stops, strict=True), before):
                    stored[row, :, : stop - start] = states[0, :, start:stop]
        self.lengths = torch.cat([self.lengths, lengths.to(self.lengths.device)])

    def leave(self, row: int) -> None:
        """Row ``row`` is finished; the last row takes its number."""
        last = len(self.lengths) - 1
        if row < last:
            length = int(self.lengths[last])
            for stored in (one for pair in self.layers_kept for one in pair):
                stored[row, :, :length] = stored[last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.lengths = self.lengths[:last]

    def advance(self) -> Tensor:
        """Make room for a token a row; returns the new tokens' positions [n, 1]."""
        self._bias.clear()
        positions = self.num_known + self.lengths
        self.lengths = self.lengths + 1
        return positions[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **_: object
    ) -> tuple[Tensor, Tensor]:
        """Keep the new tokens' keys and values [n, H_kv, 1, D]; attention reads the rest here."""
        rows = torch.arange(len(self.lengths), device=key_states.device)
        at = (self.lengths - 1).to(key_states.device)
        for stored, new in zip(
            self.layers_kept[layer_idx], (key_states, value_states), strict=True
        ):
            stored[rows, :, at] = new[:, :, 0]
        return key_states, value_states

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, H_kv, longest, D] of the rows alive."""
        count, longest = len(self.lengths), self.longest
        keys, values = self.layers_kept[layer]
        return keys[:count, :, :longest], values[:count, :, :longest]

    def bias(self, window: int | None, like: Tensor) -> Tensor | None:
        """0 where a row's newest token may look, -inf elsewhere, [n, 1, 1, P + longest]; None:
        everywhere. ``window``: sliding window, the token itself included."""
        if window not in self._bias:
            self._bias[window] = self._make_bias(window, like)
        return self._bias[window]

    def _make_bias(self, window: int | None, like: Tensor) -> Tensor | None:
        known, longest = self.num_known, self.longest
        even = bool((self.lengths == longest).all())
        if even and (window is None or known + longest <= window):
            return None
        newest = (known + self.lengths - 1)[:, None]
        place = torch.arange(known + longest)
        seen = place <= newest
        if window is not None:
            seen &= newest - place < window
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        return bias[:, None, None].to(like.device)


def _grown(stored: Tensor, used: int, rows: int, room: int) -> Tensor:
    """``stored`` with at least so many rows and places; at least doubled where it grows."""
    have_rows, heads, have_room, dim = stored.shape
    if rows <= have_rows and room <= have_room:
        return stored
    rows = max(rows, 2 * have_rows) if rows > have_rows else have_rows
    room = max(room, have_room)
    # zeros: what is masked has a weight of 0, which must not meet a NaN
    grown = stored.new_zeros((rows, heads, room, dim))
    grown[:used, :, :have_room] = stored[:used]
    return grown

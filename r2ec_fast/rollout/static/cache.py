"""The shared-prompt cache with slots that stay: steps of fixed shapes."""

import torch
from torch import Tensor

from r2ec_fast.rollout.shared_prompt.cache import SharedPromptCache


class StaticCache(SharedPromptCache):
    """`SharedPromptCache` whose B * G rows keep their slots, and whose steps all do the same.

    Where a row's next token goes is a number on the device: ``position``, int64 [B * G], its place
    among the row's own tokens. Attention covers all R places of a suffix, and a mask hides those
    behind the newest token, so a row goes back by a smaller ``position``. The prefill is that of
    `SharedPromptCache`; `begin` follows it.
    """

    def begin(self) -> None:
        """Leave the prefill: every row's next token is its first."""
        keys = self.suffix[0][0]  # [B * G, H_kv, R, D]
        rows, heads, room, _ = keys.shape
        for stored in (one for pair in self.suffix for one in pair):
            stored.zero_()  # what is masked has a weight of 0, which must not meet a NaN
        self.suffix_length = room
        self.position = torch.zeros(rows, dtype=torch.int64, device=keys.device)
        self._row_lengths = self.lengths.repeat_interleave(self.num_samples)
        # first place of each row and head in a suffix that is seen as [B * G * H_kv * R, D]
        self._first = torch.arange(rows * heads, device=keys.device).view(rows, heads) * room
        longest = self.prefix[0][0].shape[2]
        place = torch.arange(longest + room, device=keys.device)
        length = self.lengths[:, None]
        # position of each stored key in its text; padding of a prompt lies behind every token
        key = torch.where(place < length, place, longest + room)
        key = torch.where(place >= longest, place - longest + length, key)
        self._key_position = key[:, None]  # [B, 1, P + R]
        self._zero = torch.zeros((), device=keys.device)

    def advance(self, keep: Tensor | None = None) -> Tensor:
        """Make room for one token a row; returns the position ids [B * G, 1] of the new tokens.

        Raises:
            ValueError: ``keep`` is not None. Rows keep their slots.
        """
        if keep is not None:
            raise ValueError("keep: expected None, because rows keep their slots")
        self._bias.clear()
        self._newest = self._row_lengths + self.position
        self._places = (self._first + self.position[:, None]).view(-1)
        self.position += 1
        return self._newest[:, None]

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values [n, H_kv, q, D]; attention reads the rest from here."""
        if self.suffix_length is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        for stored, new in zip(self.suffix[layer_idx], (key_states, value_states), strict=True):
            dim = stored.shape[3]
            stored.view(-1, dim).index_copy_(0, self._places, new.reshape(-1, dim))
        return key_states, value_states

    def _make_bias(self, window: int | None, rep: int) -> Tensor:
        """[B, 1, G * rep, P + R]: rows may stand at different positions."""
        newest = self._newest.view(self.num_prompts, self.num_samples, 1)
        hidden = self._key_position > newest  # [B, G, P + R]
        if window is not None:
            hidden |= newest - self._key_position >= window
        bias = self._zero.masked_fill(hidden, -torch.inf)
        return bias[:, :, None].expand(-1, -1, rep, -1).flatten(1, 2)[:, None]

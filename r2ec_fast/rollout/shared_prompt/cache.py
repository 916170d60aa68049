"""The cache of shared-prompt decoding: each prompt stored once, the samples' suffixes beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from r2ec_fast.model.prefix_cache import KnownPrefix


class SharedPromptCache(Cache):
    """K/V of B prompts stored once, and of up to B * G suffixes in preallocated slots.

    Slot `b * G + g` belongs to sample g of prompt b. Rows that finish leave a dead slot behind;
    when half of the slots are dead the live ones are packed together. Nothing else is copied.

    Per layer: prefix [B, H_kv, P, D] (right-padded to the longest prompt), suffix
    [B * G, H_kv, R, D], both allocated by the first prefill.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        num_samples: int,
        max_suffix: int,
        known: KnownPrefix | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.known = known  # what the prompts begin with
        self.lengths = torch.tensor(lengths)
        self._longest = max(lengths)
        self.num_samples = num_samples
        self.max_suffix = max_suffix
        self.prefix: list[tuple[Tensor, Tensor]] = []
        self.suffix: list[tuple[Tensor, Tensor]] = []
        self.prompt = 0  # the prompt that is being prefilled
        self.suffix_length: int | None = None  # tokens in the suffixes; None while prefilling
        self.slots: Tensor | None = None  # int64 [n] slot of each live row; None: row r in slot r
        self._bias: dict[tuple[int | None, int], Tensor | None] = {}

    @property
    def num_prompts(self) -> int:
        return len(self.lengths)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values [n, H_kv, q, D]; attention reads the rest from here.

        What else models of a transformers version hand over is theirs alone.
        """
        if self.suffix_length is None:
            if layer_idx == len(self.prefix):
                self._allocate(key_states)
            if self.known is not None:
                key_states, value_states = self.known.update(key_states, value_states, layer_idx)
            length = key_states.shape[2]
            for stored, new in zip(self.prefix[layer_idx], (key_states, value_states), strict=True):
                stored[self.prompt, :, :length] = new[0]
            return key_states, value_states
        at = self.suffix_length - 1
        for stored, new in zip(self.suffix[layer_idx], (key_states, value_states), strict=True):
            if self.slots is None:
                stored[:, :, at] = new[:, :, 0]
            else:
                stored[self.slots, :, at] = new[:, :, 0]
        return key_states, value_states

    def _allocate(self, like: Tensor) -> None:
        heads, dim = like.shape[1], like.shape[3]
        prompts, longest = self.num_prompts, self._longest
        self.lengths = self.lengths.to(like.device)
        # zeros: padding is masked by a zero weight, which must not meet a NaN
        prefix = (prompts, heads, longest, dim)
        self.prefix.append((like.new_zeros(prefix), like.new_zeros(prefix)))
        suffix = (prompts * self.num_samples, heads, self.max_suffix, dim)
        self.suffix.append((like.new_empty(suffix), like.new_empty(suffix)))

    def advance(self, keep: Tensor | None) -> Tensor:
        """Make room for one token a row; returns the position ids [n, 1] of the new tokens.

        Args:
            keep: int64, the rows of the previous step that go on; None = all.
        """
        self._bias.clear()
        if keep is not None:
            slots = keep if self.slots is None else self.slots[keep]
            self.slots = slots
            if 2 * len(slots) <= self.num_prompts * self.num_samples:
                self._compact(slots)
        self.suffix_length = 1 if self.suffix_length is None else self.suffix_length + 1
        position = (self.lengths + self.suffix_length - 1).repeat_interleave(self.num_samples)
        return (position if self.slots is None else position[self.slots])[:, None]

    def _compact(self, slots: Tensor) -> None:
        """Keep the live slots: drop prompts without any, narrow the rest to the fullest prompt."""
        prompt = slots // self.num_samples
        live, local, count = prompt.unique_consecutive(return_inverse=True, return_counts=True)
        width = int(count.max())
        rank = torch.arange(len(slots), device=slots.device) - (count.cumsum(0) - count)[local]
        target = local * width + rank
        # a slot without a row repeats slot 0: finite numbers that nobody reads
        source = slots.new_zeros(len(live) * width)
        source[target] = slots
        self.suffix = [(k[source], v[source]) for k, v in self.suffix]
        if len(live) < self.num_prompts:
            self.prefix = [(k[live], v[live]) for k, v in self.prefix]
            self.lengths = self.lengths[live]
        self.num_samples = width
        self.slots = None if len(slots) == len(source) else target

    def bias(self, window: int | None, rep: int) -> Tensor | None:
        """0 where the newest token of a prompt's rows may look, -inf elsewhere; None = everywhere.

        Args:
            window: sliding window (the token itself included), or None.
            rep: query heads of a key/value head.

        Returns:
            float32 [B, 1, 1, P + suffix_length] where all rows of a prompt stand at one position,
            else [B, 1, G * rep, P + suffix_length], or None.
        """
        key = (window, rep)
        if key not in self._bias:
            self._bias[key] = self._make_bias(window, rep)
        return self._bias[key]

    def _make_bias(self, window: int | None, rep: int) -> Tensor | None:
        longest, suffix = self.prefix[0][0].shape[2], self.suffix_length or 0
        ragged = bool((self.lengths < longest).any())
        if not ragged and (window is None or longest + suffix <= window):
            return None
        device = self.lengths.device
        key = torch.arange(longest + suffix, device=device).expand(self.num_prompts, -1)
        length = self.lengths[:, None]
        # position of each stored key; padding counts as lying in the future
        far = longest + suffix
        position = torch.where(key < length, key, far)
        position = torch.where(key >= longest, key - longest + length, position)
        newest = length + suffix - 1
        seen = position <= newest
        if window is not None:
            seen &= newest - position < window
        bias = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)
        return bias[:, None, None]

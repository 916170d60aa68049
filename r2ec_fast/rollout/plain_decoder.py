"""Decoding by the model's own cache and attention: works for any Hugging Face causal LM."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from r2ec_fast.model.hf_compat import (
    attention_implementation,
    base_causal_lm,
    cache_argument,
    model_device,
)
from r2ec_fast.model.prefix_cache import KnownPrefix
from r2ec_fast.packing.ragged import Ragged


def plain_attention_name(config: PreTrainedConfig) -> str:
    """The attention implementation to decode with: the present one if it works on a cache.

    SDPA has no soft-cap, so models that cap attention scores (Gemma-2) run eager.
    """
    current = config._attn_implementation or ""
    if current == "eager" or current.startswith("flash_attention"):
        return current
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped else "sdpa"


class PlainDecoder:
    """Each prompt is prefilled once, then its cache is repeated to G samples.

    A batch holds prompts of one length: without padding no model has to be trusted with it.
    """

    def __init__(self, model: nn.Module, prefix: KnownPrefix | None = None) -> None:
        self._model = model  # the model's own cache knows no prefix: it is computed with the rest
        self._config = base_causal_lm(model).config

    def session(self) -> AbstractContextManager[None]:
        """The attention implementation this decoder needs, restored afterwards."""
        return attention_implementation(
            base_causal_lm(self._model), plain_attention_name(self._config)
        )

    @staticmethod
    def batches(
        lengths: Sequence[int], num_generations: int, max_completion_length: int, budget: int
    ) -> Iterator[list[int]]:
        """Indices of the prompts of each batch; a prompt caches G * (P + R) tokens."""
        by_length: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            by_length.setdefault(length, []).append(index)
        for length, same in by_length.items():
            size = max(1, budget // (num_generations * (length + max_completion_length)))
            for first in range(0, len(same), size):
                yield same[first : first + size]

    def start(self, prompts: Ragged, num_generations: int, max_completion_length: int) -> Tensor:
        """Prefill prompts of one length; returns the next-token logits [B * G, V]. The cache grows
        by itself."""
        del max_completion_length
        self._cache = DynamicCache(config=self._config)
        self._length = 0
        ids = torch.from_numpy(prompts.values).view(len(prompts), -1)
        logits = self._forward(ids.to(model_device(self._model), torch.int64))
        self._cache.batch_repeat_interleave(num_generations)
        return logits.repeat_interleave(num_generations, 0)

    def step(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        """Append one token a row; returns the next-token logits [n, V].

        Args:
            tokens: int64 [n], the newest token of each row that goes on.
            keep: int64 [n], the rows (of the previous call) that go on; None = all.
        """
        if keep is not None:
            self._cache.batch_select_indices(keep)
        return self._forward(tokens[:, None])

    def _forward(self, input_ids: Tensor) -> Tensor:
        n, width = input_ids.shape
        positions = torch.arange(self._length, self._length + width, device=input_ids.device)
        self._length += width
        out = self._model(
            input_ids=input_ids,
            position_ids=positions.expand(n, width),
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(type(base_causal_lm(self._model))): self._cache},
        )
        return out.logits[:, -1]

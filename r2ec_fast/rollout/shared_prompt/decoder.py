"""Shared-prompt decoding: one prefill, one stored cache and one pass over it for all G samples."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from r2ec_fast.model.hf_compat import (
    attention_implementation,
    base_causal_lm,
    cache_argument,
    model_device,
)
from r2ec_fast.model.prefix_cache import KnownPrefix
from r2ec_fast.packing.ragged import Ragged, Rows
from r2ec_fast.rollout.shared_prompt import attention
from r2ec_fast.rollout.shared_prompt.cache import SharedPromptCache

# architectures whose rollouts are tested against a full forward pass
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"})


class SharedPromptDecoder:
    """Decodes with `SharedPromptCache` and the `r2ec_rollout` attention implementation."""

    cache_type = SharedPromptCache

    def __init__(self, model: nn.Module, prefix: KnownPrefix | None = None) -> None:
        self._model = model
        self._prefix = prefix  # what prompts may begin with; it is not computed again then

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Why this decoder cannot run `model`; None if it can."""
        config = base_causal_lm(model).config
        if config.model_type not in MODEL_TYPES:
            return f"model type {config.model_type!r} is not among {sorted(MODEL_TYPES)}"
        if getattr(config, "use_bidirectional_attention", False):
            return "the model attends in both directions"
        return None

    def session(self) -> AbstractContextManager[None]:
        """The attention implementation this decoder needs, restored afterwards."""
        attention.register()
        return attention_implementation(base_causal_lm(self._model), attention.NAME)

    @staticmethod
    def batches(
        lengths: Sequence[int], num_generations: int, max_completion_length: int, budget: int
    ) -> Iterator[list[int]]:
        """Indices of the prompts of each batch, longest first; a prompt caches P + G * R tokens."""
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[batch[0]] if batch else lengths[index]
            cost = longest + num_generations * max_completion_length
            if batch and cost * (len(batch) + 1) > budget:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def start(self, prompts: Rows, num_generations: int, max_completion_length: int) -> Tensor:
        """Prefill the prompts one after the other; returns the next-token logits [B * G, V]."""
        prompts = Ragged.of(prompts, "prompts")
        known = self._prefix
        if known is not None and not known.begins(prompts):
            known = None
        first = 0 if known is None else len(known)
        lengths = prompts.lengths.tolist()
        self._cache = self.cache_type(lengths, num_generations, max_completion_length, known)
        device = model_device(self._model)
        logits = []
        for index, prompt in enumerate(prompts):
            self._cache.prompt = index
            ids = torch.from_numpy(prompt[first:]).to(device, torch.int64)[None]
            logits.append(self._forward(ids, torch.arange(first, len(prompt), device=device)[None]))
        return torch.cat(logits).repeat_interleave(num_generations, 0)

    def step(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        """Append one token a row; returns the next-token logits [n, V].

        Args:
            tokens: int64 [n], the newest token of each row that goes on.
            keep: int64 [n], the rows (of the previous call) that go on; None = all.
        """
        return self._forward(tokens[:, None], self._cache.advance(keep))

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        out = self._model(
            input_ids=input_ids,
            position_ids=position_ids,
            rollout_cache=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(type(base_causal_lm(self._model))): self._cache},
        )
        return out.logits[:, -1]

"""Shared-prompt decoding in steps of fixed shapes."""

from torch import Tensor, nn

from r2ec_fast.model.hf_compat import base_causal_lm, rope_follows_length
from r2ec_fast.packing.ragged import Rows
from r2ec_fast.rollout.shared_prompt.decoder import SharedPromptDecoder
from r2ec_fast.rollout.static.cache import StaticCache


class StaticDecoder(SharedPromptDecoder):
    """`SharedPromptDecoder` whose rows keep their slots until the batch ends.

    A step does the same operations on the same addresses whatever the position, and none of them
    waits for the host.
    """

    cache_type = StaticCache
    _cache: StaticCache

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Why this decoder cannot run `model`; None if it can."""
        from torch.distributed.fsdp import FSDPModule

        if reason := SharedPromptDecoder.refuses(model):
            return reason
        if rope_follows_length(base_causal_lm(model).config):
            return "its rotary frequencies follow the length of a row"
        if len({parameter.device for parameter in model.parameters()}) > 1:
            return "its weights are on several devices"
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            return "its weights are sharded over processes"
        return None

    def start(self, prompts: Rows, num_generations: int, max_completion_length: int) -> Tensor:
        """Prefill the prompts one after the other; returns the next-token logits [B * G, V]."""
        logits = super().start(prompts, num_generations, max_completion_length)
        self._cache.begin()
        return logits

    def place(self, positions: Tensor) -> None:
        """The next step writes each row's token at ``positions``, int64 [B * G], of its own tokens;
        what lies there and behind is forgotten."""
        self._cache.position.copy_(positions)

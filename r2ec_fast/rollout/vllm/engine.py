"""Rollouts on vLLM, in process: n = G per request, the policy's adapter swapped in each step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.rollout.sampling import SamplingParams
from r2ec_fast.rollout.vllm.common import Completion, Scorer, VLLMBase


class VLLMEngine(VLLMBase):
    """Samples with a `vllm.LLM`. See `TransformersEngine.generate` for the protocol.

    `VLLMBase` says what the log-probabilities mean.

    Args:
        llm: made with `logprobs_mode="processed_logprobs"`, see `launch`.
        tokenizer: the model's.
        marker, marker_ids, eos_token_ids: as in `TransformersEngine`.
        policy: the PeftModel being trained. Its active adapter is written out and swapped in at
            every `generate`; None samples from the weights vLLM loaded.
        scorer: `(prompts, rollouts, temperature) -> float32 [E]`, as `score_rollouts` gives it.

    Raises:
        ValueError: a wrong `logprobs_mode`, or a policy without exactly one active adapter.
    """

    def __init__(
        self,
        llm: Any,
        tokenizer: PreTrainedTokenizerBase,
        marker: str = "<answer>",
        marker_ids: Sequence[int] | None = None,
        *,
        eos_token_ids: Sequence[int] | None = None,
        policy: nn.Module | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        mode = llm.llm_engine.model_config.logprobs_mode
        if mode != "processed_logprobs":
            raise ValueError(f"logprobs_mode must be 'processed_logprobs', got {mode!r}")
        super().__init__(tokenizer, marker, marker_ids, eos_token_ids, policy, scorer)
        self.llm = llm
        self._lora_request: Any = None

    @staticmethod
    def launch(
        model: str,
        *,
        max_model_length: int,
        max_lora_rank: int = 0,
        dtype: str = "auto",
        max_num_seqs: int = 64,
        gpu_memory_utilization: float = 0.5,
        enforce_eager: bool = False,
    ) -> Any:
        """A `vllm.LLM` fit for this engine.

        Args:
            model: folder of the base model.
            max_model_length: longest prompt + completion, tokens.
            max_lora_rank: largest adapter rank; 0 = no adapters. Rounded up to one vLLM takes.
            gpu_memory_utilization: share of the GPU; leave room for training.

        Raises:
            ModuleNotFoundError: vLLM is not installed (`pip install "r2ec-fast[vllm]"`).
        """
        from vllm import LLM

        lora = {}
        if max_lora_rank:
            ranks = (8, 16, 32, 64, 128, 256, 320, 512)
            rank = next((r for r in ranks if r >= max_lora_rank), None)
            if rank is None:
                raise ValueError(f"max_lora_rank must be at most {ranks[-1]}, got {max_lora_rank}")
            lora = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        return LLM(
            model=model,
            max_model_len=max_model_length,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            logprobs_mode="processed_logprobs",
            **lora,
        )

    def _complete(
        self,
        prompts: Ragged,
        seeds: Sequence[int],
        num_generations: int,
        max_completion_length: int,
        params: SamplingParams,
    ) -> list[Completion]:
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt.tolist()} for prompt in prompts],
            [self._settings(key, num_generations, max_completion_length, params) for key in seeds],
            lora_request=self._lora_request,
            use_tqdm=False,
        )
        return [
            (
                list(one.token_ids),
                [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)],
            )
            for output in outputs
            for one in sorted(output.outputs, key=lambda one: one.index)
        ]

    def _settings(
        self, key: int, num_generations: int, max_completion_length: int, params: SamplingParams
    ) -> Any:
        import vllm

        return vllm.SamplingParams(
            n=num_generations,
            temperature=0.0 if params.greedy else params.temperature,
            top_k=0 if params.greedy else params.top_k,
            max_tokens=max_completion_length,
            seed=None if params.greedy else key,
            logprobs=0,
            stop=[self.stop.marker],
            include_stop_str_in_output=True,
            stop_token_ids=sorted(self.eos_token_ids),
            skip_special_tokens=False,
        )

    def _install_adapter(self, version: int, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        self._lora_request = LoRARequest(f"policy-{version}", version, str(folder))

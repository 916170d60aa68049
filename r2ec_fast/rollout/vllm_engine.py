"""Rollouts on vLLM, in process: n = G per request, the policy's adapter swapped in each step."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from r2ec_fast.rollout.base import Rollouts, Trajectory, assemble, check_request
from r2ec_fast.rollout.marker import MarkerStop
from r2ec_fast.rollout.noise import row_keys
from r2ec_fast.rollout.sampling import SamplingParams

Scorer = Callable[[Sequence[Sequence[int]], Rollouts, float], np.ndarray]


class VLLMEngine:
    """Samples with a `vllm.LLM`. See `TransformersEngine.generate` for the protocol.

    vLLM's log-probabilities ("processed_logprobs") are taken after temperature AND top-k, so they
    equal this project's (full vocabulary) only for `top_k=0`. For `top_k > 0` the `scorer` computes
    `log_prob`, and vLLM's own numbers travel as `sampler_log_prob`. A scorer is always used where
    one is given, so that `log_prob` has the training model's numerics.

    The noise is vLLM's: samples depend on (seed, step, user key, sample), not on the batch, up to
    the rounding of its products, but they differ from `TransformersEngine`'s.

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
        if policy is not None and len(getattr(policy, "active_adapters", ())) != 1:
            raise ValueError(
                f"policy must be a PeftModel with one active adapter, got {type(policy).__name__}"
            )
        self.llm = llm
        self.stop = MarkerStop(tokenizer, marker)
        if marker_ids is None:
            marker_ids = tokenizer.encode(marker, add_special_tokens=False)
        self.marker_ids = [int(token) for token in marker_ids]
        eos = [tokenizer.eos_token_id] if eos_token_ids is None else eos_token_ids
        self.eos_token_ids = frozenset(int(token) for token in eos if token is not None)
        self.policy = policy
        self.scorer = scorer
        self._adapters = tempfile.TemporaryDirectory(prefix="r2ec-adapters-")
        self._version = 0

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

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        user_keys: Sequence[int],
        num_generations: int,
        max_completion_length: int,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        step: int = 0,
        greedy: bool = False,
    ) -> Rollouts:
        """Sample `num_generations` completions of every prompt (`TransformersEngine.generate`).

        Raises:
            ValueError: bad arguments, or `top_k > 0` without a scorer.
        """
        check_request(prompts, user_keys, num_generations, max_completion_length)
        params = SamplingParams(temperature, top_k, greedy)
        if self.scorer is None and not greedy and top_k > 0:
            raise ValueError(
                f"top_k={top_k} needs a scorer: vLLM's log-probabilities are renormalised to the "
                "top-k; give VLLMEngine(scorer=...) or sample with top_k=0"
            )
        if not prompts:
            return assemble([], self.marker_ids)
        # the samples of a request use its seed + 0 .. G - 1
        seeds = (row_keys(user_keys, 1, seed=seed, step=step) & (2**62 - 1)).tolist()
        outputs = self.llm.generate(
            [{"prompt_token_ids": [int(token) for token in prompt]} for prompt in prompts],
            [self._settings(key, num_generations, max_completion_length, params) for key in seeds],
            lora_request=self._swap_adapter(),
            use_tqdm=False,
        )
        rows = [
            self._trajectory(list(one.token_ids), one.logprobs)
            for output in outputs
            for one in sorted(output.outputs, key=lambda one: one.index)
        ]
        rollouts = assemble(rows, self.marker_ids)
        if self.scorer is None:
            return rollouts
        exact = self.scorer(prompts, rollouts, temperature)
        return dataclasses.replace(rollouts, log_prob=exact, sampler_log_prob=rollouts.log_prob)

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

    def _trajectory(self, tokens: list[int], log_probs: Sequence[Any]) -> Trajectory:
        row = Trajectory(tokens, [at[t].logprob for t, at in zip(tokens, log_probs, strict=True)])
        if tokens and tokens[-1] in self.eos_token_ids:
            row.finish_reason = "eos"
            del row.tokens[-1], row.log_prob[-1]
        elif tokens and self.stop.closes(tokens):
            row.finish_reason = "answer"
        return row

    def _swap_adapter(self) -> Any:
        """Write the policy's adapter under a new id, so that no cached prompt state outlives it."""
        if self.policy is None:
            return None
        from vllm.lora.request import LoRARequest

        self._version += 1
        folder = Path(self._adapters.name) / str(self._version)
        (name,) = self.policy.active_adapters
        self.policy.save_pretrained(str(folder), selected_adapters=[name])
        shutil.rmtree(folder.with_name(str(self._version - 1)), ignore_errors=True)
        where = folder if name == "default" else folder / name
        return LoRARequest(f"policy-{self._version}", self._version, str(where))

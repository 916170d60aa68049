"""What the two vLLM engines share: the protocol, row ends, seeds, the policy's adapter."""

import dataclasses
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from r2ec_fast.packing.ragged import Ragged, Rows
from r2ec_fast.rollout.base import Rollouts, Trajectory, assemble, check_request
from r2ec_fast.rollout.marker import MarkerStop
from r2ec_fast.rollout.noise import row_keys
from r2ec_fast.rollout.sampling import SamplingParams

if TYPE_CHECKING:
    from peft import PeftModel

Scorer = Callable[[Ragged, Rollouts, float], np.ndarray]
Completion = tuple[list[int], list[float]]  # token ids and their log-probabilities


def _one_adapter(policy: nn.Module | None) -> "PeftModel | None":
    if policy is None:
        return None
    from peft import PeftModel

    if not isinstance(policy, PeftModel) or len(policy.active_adapters) != 1:
        raise ValueError(
            f"policy must be a PeftModel with one active adapter, got {type(policy).__name__}"
        )
    return policy


class VLLMBase(ABC):
    """A rollout engine whose tokens come from vLLM.

    vLLM's log-probabilities ("processed_logprobs") are taken after temperature AND top-k, so they
    equal this project's (full vocabulary) only for `top_k=0`. For `top_k > 0` the `scorer` computes
    `log_prob`, and vLLM's own numbers travel as `sampler_log_prob`. A scorer is always used where
    one is given, so that `log_prob` has the training model's numerics.

    The noise is vLLM's: samples depend on (seed, step, user key, sample), not on the batch, up to
    the rounding of its products, but they differ from `TransformersEngine`'s. Greedy
    log-probabilities are taken at temperature 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        marker: str,
        marker_ids: Sequence[int] | None,
        eos_token_ids: Sequence[int] | None,
        policy: nn.Module | None,
        scorer: Scorer | None,
        adapter_dir: str | None = None,
    ) -> None:
        self.stop = MarkerStop(tokenizer, marker)
        if marker_ids is None:
            marker_ids = tokenizer.encode(marker, add_special_tokens=False)
        self.marker_ids = [int(token) for token in marker_ids]
        eos = [tokenizer.eos_token_id] if eos_token_ids is None else eos_token_ids
        self.eos_token_ids = frozenset(int(token) for token in eos if token is not None)
        self.policy = _one_adapter(policy)
        self.scorer = scorer
        self._adapters = tempfile.TemporaryDirectory(prefix="r2ec-adapters-", dir=adapter_dir)
        self._version = 0

    def generate(
        self,
        prompts: Rows,
        *,
        user_keys: Sequence[int],
        num_generations: int,
        max_completion_length: int,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        step: int = 0,
        greedy: bool = False,
        states: bool = False,
    ) -> Rollouts:
        """Sample `num_generations` completions of every prompt (`TransformersEngine.generate`).

        `Rollouts.states` is None where vLLM shows none, whatever `states` says.

        Raises:
            ValueError: bad arguments, or `top_k > 0` without a scorer.
        """
        prompts = check_request(prompts, user_keys, num_generations, max_completion_length)
        params = SamplingParams(temperature, top_k, greedy)
        if self.scorer is None and not greedy and top_k > 0:
            raise ValueError(
                f"top_k={top_k} needs a scorer: vLLM's log-probabilities are renormalised to the "
                "top-k; give the engine a scorer or sample with top_k=0"
            )
        if not len(prompts):
            return assemble([], self.marker_ids)
        # the samples of a request use its seed + 0 .. G - 1
        seeds = (row_keys(user_keys, 1, seed=seed, step=step) & (2**62 - 1)).tolist()
        self._swap_adapter()
        rows = [
            self._trajectory(*completion)
            for completion in self._complete(
                prompts, seeds, num_generations, max_completion_length, params
            )
        ]
        rollouts = assemble(rows, self.marker_ids)
        if states:
            rollouts = dataclasses.replace(rollouts, states=self._states(prompts, rollouts))
        if self.scorer is None:
            return rollouts
        exact = self.scorer(prompts, rollouts, temperature)
        return dataclasses.replace(rollouts, log_prob=exact, sampler_log_prob=rollouts.log_prob)

    @abstractmethod
    def _complete(
        self,
        prompts: Ragged,
        seeds: Sequence[int],
        num_generations: int,
        max_completion_length: int,
        params: SamplingParams,
    ) -> list[Completion]:
        """B * G completions in order; an end-of-text token that ended one is its last token."""

    def _states(self, prompts: Ragged, rollouts: Rollouts) -> torch.Tensor | None:
        """[B * G, d], after the final norm at the end of each row; None: they are not shown."""
        return None

    @abstractmethod
    def _install_adapter(self, version: int, folder: Path) -> None:
        """Use the adapter in `folder`, and no longer the one of `version - 1`."""

    def _trajectory(self, tokens: list[int], log_probs: list[float]) -> Trajectory:
        row = Trajectory(list(tokens), list(log_probs))
        if tokens and tokens[-1] in self.eos_token_ids:
            row.finish_reason = "eos"
            del row.tokens[-1], row.log_prob[-1]
        elif tokens and self.stop.closes(tokens):
            row.finish_reason = "answer"
        return row

    def _swap_adapter(self) -> None:
        """Write the policy's adapter under a new name, so that no cached state outlives it."""
        if self.policy is None:
            return
        self._version += 1
        folder = Path(self._adapters.name) / str(self._version)
        (name,) = self.policy.active_adapters
        self.policy.save_pretrained(str(folder), selected_adapters=[name])
        self._install_adapter(self._version, folder if name == "default" else folder / name)
        shutil.rmtree(folder.with_name(str(self._version - 1)), ignore_errors=True)

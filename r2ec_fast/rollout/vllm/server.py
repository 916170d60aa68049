"""Rollouts on a running vLLM server (its OpenAI-compatible HTTP interface)."""

import json
import logging
import urllib.error
import urllib.request
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from r2ec_fast.model.hf_compat import base_causal_lm
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.rollout.base import Rollouts
from r2ec_fast.rollout.sampling import SamplingParams
from r2ec_fast.rollout.vllm.common import Completion, Scorer, VLLMBase
from r2ec_fast.rollout.vllm.states import StateFiles

log = logging.getLogger(__name__)

COMMAND = "vllm serve MODEL --logprobs-mode processed_logprobs --enable-lora --max-lora-rank 8"


COMPLETIONS = "/v1/completions"


class _NoStatesError(Exception):
    """States do not come from the server, and why."""


class RolloutServerError(ConnectionError):
    """The vLLM server cannot be reached, died, or refused a request."""


class VLLMServerEngine(VLLMBase):
    """Samples from a vLLM server; the protocol and the log-probabilities are `VLLMEngine`'s.

    A server that extracts states (docs/guides/rollout.md) shows a policy's to
    `generate(states=True)`.

    Start it as `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --logprobs-mode
    processed_logprobs --enable-lora --max-lora-rank 8`. The server reads the adapter from
    `adapter_dir`, which it must see under the same path.

    Args:
        url: such as "http://localhost:8000".
        model: name the server serves the base model under; None: the one that it lists.
        tokenizer, marker, marker_ids, eos_token_ids, policy, scorer: as in `VLLMEngine`.
        adapter_dir: folder for the adapters; default: the system's temporary folder.
        timeout: seconds one request may take.
        concurrency: requests (prompts) under way at once.

    Raises:
        RolloutServerError: no server at `url`.
        ValueError: the server was started with another `--logprobs-mode`.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        tokenizer: PreTrainedTokenizerBase,
        marker: str = "<answer>",
        marker_ids: Sequence[int] | None = None,
        *,
        eos_token_ids: Sequence[int] | None = None,
        policy: nn.Module | None = None,
        scorer: Scorer | None = None,
        adapter_dir: str | None = None,
        timeout: float = 600.0,
        concurrency: int = 64,
    ) -> None:
        super().__init__(tokenizer, marker, marker_ids, eos_token_ids, policy, scorer, adapter_dir)
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.concurrency = concurrency
        self._files = StateFiles()
        weakref.finalize(self, self._files.close)
        self._extracts = True  # until it is seen not to
        self.model = self._served = model or self._base_model()
        self._check_mode()

    def _check_mode(self) -> None:
        # the one token that top_k=1 keeps has probability 1 only where truncation is counted
        params = SamplingParams(temperature=2.0, top_k=1)
        one_token = Ragged.of([self.marker_ids[:1]])
        ((_, log_probs),) = self._complete(one_token, [0], 1, 1, params)
        if log_probs[0] < -1e-3:
            raise ValueError(
                f"the server at {self.url} must run with --logprobs-mode processed_logprobs"
            )

    def _base_model(self) -> str:
        listed = json.loads(self._ask("/v1/models"))["data"]
        return next(one["id"] for one in listed if one.get("parent") is None)

    def _post(self, path: str, body: dict[str, Any], id_: str | None = None) -> bytes:
        return self._ask(path, json.dumps(body).encode(), id_)

    def _ask(self, path: str, body: bytes | None = None, id_: str | None = None) -> bytes:
        """The answer to a GET, or to a POST of ``body``; ``id_`` becomes a part of the request's
        id there."""
        headers = {"Content-Type": "application/json"}
        if id_ is not None:
            headers["X-Request-Id"] = id_
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            raise RolloutServerError(
                f"vLLM server {self.url}{path} answered {error.code}: {text}"
            ) from error
        except (OSError, HTTPException) as error:
            raise RolloutServerError(
                f"vLLM server {self.url} does not answer ({error}); start it again with "
                f"`{COMMAND}` and resume from the last checkpoint"
            ) from error

    def _complete(
        self,
        prompts: Ragged,
        seeds: Sequence[int],
        num_generations: int,
        max_completion_length: int,
        params: SamplingParams,
    ) -> list[Completion]:
        def ask(prompt: np.ndarray, seed: int) -> list[Completion]:
            body = self._body(prompt, max_completion_length) | {
                "n": num_generations,
                "temperature": 0.0 if params.greedy else params.temperature,
                "top_k": 0 if params.greedy else params.top_k,
                "seed": None if params.greedy else seed,
                "logprobs": 0,
                "stop": [self.stop.marker],
                "include_stop_str_in_output": True,
                "stop_token_ids": sorted(self.eos_token_ids),
            }
            id_ = self._files.new_id()
            answer = json.loads(self._post(COMPLETIONS, body, id_))
            self._files.discard(id_, answer)
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            return [(one["token_ids"], one["logprobs"]["token_logprobs"]) for one in choices]

        with ThreadPoolExecutor(self.concurrency) as pool:
            return [row for rows in pool.map(ask, prompts, seeds) for row in rows]

    def _body(self, prompt: np.ndarray, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self._served,
            "prompt": prompt.tolist(),
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": max_tokens,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }

    def _states(self, prompts: Ragged, rollouts: Rollouts) -> torch.Tensor | None:
        """By a request of one token a row, of which the server has nearly all in its cache."""
        if not self._extracts or self.policy is None:
            return None
        group = len(rollouts) // len(prompts)
        rows = prompts.select(np.arange(len(prompts)).repeat(group)).join(rollouts.tokens)

        def ask(row: np.ndarray) -> tuple[torch.Tensor, int]:
            answer = json.loads(self._post(COMPLETIONS, self._body(row, 1), self._files.new_id()))
            try:
                state = self._files.read(answer, len(row))
            except (OSError, ValueError) as error:
                raise _NoStatesError(str(error)) from error
            return state, answer["choices"][0]["token_ids"][0]

        try:
            found = [ask(rows[0])]
            with ThreadPoolExecutor(self.concurrency) as pool:
                found += pool.map(ask, rows[1:])
            return self._normed([state for state, _ in found], [token for _, token in found])
        except _NoStatesError as reason:
            log.info("states are computed by the model here, not by the vLLM server: %s", reason)
            self._extracts = False
            return None

    @torch.no_grad()
    def _normed(self, found: list[torch.Tensor], tokens: list[int]) -> torch.Tensor:
        """States after the norm, which predict the tokens that the server wrote next."""
        assert self.policy is not None
        model = base_causal_lm(self.policy)
        norm = getattr(model.get_decoder(), "norm", None)
        if norm is None:
            raise _NoStatesError(f"{type(model).__name__} has no final norm that is known here")
        states: torch.Tensor = norm(torch.stack(found).to(norm.weight.device, norm.weight.dtype))
        likely = model.get_output_embeddings()(states).argmax(-1).tolist()
        wrong = sum(one != token for one, token in zip(likely, tokens, strict=True))
        if 4 * wrong > len(tokens):  # rounding may turn near ties
            raise _NoStatesError(
                f"{wrong} of {len(tokens)} do not predict the server's next token; is the layer "
                "num_hidden_layers the last of those extracted?"
            )
        return states

    def _install_adapter(self, version: int, folder: Path) -> None:
        name = f"policy-{version}"
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        previous, self._served = self._served, name
        if previous != self.model:
            self._post("/v1/unload_lora_adapter", {"lora_name": previous})

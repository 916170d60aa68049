"""Reasonings that a vLLM server writes, and states that it reads where it extracts them."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from r2ec_fast.rollout import score_rollouts
from r2ec_fast.rollout.base import Trajectory, assemble
from r2ec_fast.rollout.marker import MarkerStop
from r2ec_fast.rollout.vllm.states import StateFiles, states_path
from r2ec_fast.serve.engines.vllm_client import VLLMClient
from r2ec_fast.serve.jobs import EngineUnavailable, Job, Written
from r2ec_fast.serve.reasoning_text import ReasoningText

if TYPE_CHECKING:
    from r2ec_fast.model.r2ec import R2ecModel

log = logging.getLogger(__name__)

COMPLETIONS = "/v1/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PROBE_TOKENS = 16
MOST_LOG_PROB = 0.1  # mean difference; bfloat16 makes 0.03 at most, an adapter left out 0.4
LEAST_COSINE = 0.98


class VLLMWriter:
    """A `Writer` that asks a vLLM server, which batches what it is asked together.

    At the start it loads the model's adapter into the server, or finds the server to serve the
    merged weights, compares log-probabilities of a first text with ``model``'s own, and finds out
    whether the server shows states.

    Args:
        url: such as "http://localhost:8000".
        model: the one that is served; used only here, at the start.
        marker_ids: tokens of the marker.
        eos_token_ids: tokens that end a text.
        probe: a prompt to compare with.
        slots: requests at the server together.
        timeout: seconds without a word of the server after which it counts as away.

    Raises:
        EngineUnavailable: no server there.
        ValueError: it serves other weights.
    """

    def __init__(
        self,
        url: str,
        model: R2ecModel,
        marker_ids: Sequence[int],
        eos_token_ids: frozenset[int],
        probe: Sequence[int],
        *,
        slots: int = 64,
        timeout: float = 600.0,
    ) -> None:
        self.slots = slots
        self._client = VLLMClient(url, timeout)
        self._marker, self._eos = list(marker_ids), eos_token_ids
        tokenizer, marker = copy.deepcopy(model.tokenizer), model.prompts.emb_token
        self._stop = MarkerStop(tokenizer, marker)
        self._text = ReasoningText(tokenizer, marker)
        self._decoding = threading.Lock()  # a tokenizer serves one thread at a time
        self._files = StateFiles()
        self._norm: torch.nn.Module | None = None
        self._adapter: tempfile.TemporaryDirectory[str] | None = None
        self._served = ""
        self._loaded: str | None = None
        try:
            self._choose_weights(model, [int(token) for token in probe])
            self._look_for_states(model, [int(token) for token in probe])
        except BaseException:
            self._unload_adapter()
            raise
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="r2ec-vllm")

    @property
    def extracts(self) -> bool:
        """Whether states come from the server."""
        return self._norm is not None

    def start(self, job: Job, done: Callable[[Job], None]) -> None:
        self._pool.submit(self._work, job, done)

    def close(self) -> None:
        self._pool.shutdown()
        self._files.close()
        self._unload_adapter()

    # ---- a job ----------------------------------------------------------------------------------

    def _work(self, job: Job, done: Callable[[Job], None]) -> None:
        try:
            self._write(job)
        except Exception as error:
            if not job.expire(time.monotonic()):
                log.error("a reasoning failed: %s", error)
                job.fail(error)
        finally:
            done(job)

    def _write(self, job: Job) -> None:
        if job.expire(time.monotonic()):
            return
        reasoning = self._reasoning(job)
        if job.expire(time.monotonic()):
            return
        if reasoning.finish_reason is None:
            raise EngineUnavailable(
                f"the vLLM server ended a reasoning ({reasoning.ended}) after "
                f"{len(reasoning.tokens)} of {job.limit} tokens"
            )
        with self._decoding:
            self._text.show(job, reasoning.tokens, whole=True)
            text = self._text.of(reasoning.tokens).strip()
        rest = [] if reasoning.finish_reason == "answer" else self._marker
        tokens = [*reasoning.tokens, *rest]
        state = self._state([*job.prompt.tolist(), *tokens], job)
        if state is not None:
            job.mark("written")
        job.written = Written(tokens, text, reasoning.finish_reason, len(reasoning.tokens), state)

    def _reasoning(self, job: Job) -> _Reasoning:
        reasoning, id_ = _Reasoning(job.limit), self._files.new_id()
        body = self._body(job.prompt, job.limit)
        try:
            if job.on_text is None:
                answer = self._client.post(COMPLETIONS, body, job, id_)
                self._take(job, reasoning, answer["choices"][0])
            else:
                for part in self._client.stream(COMPLETIONS, body, job, id_):
                    for choice in part["choices"]:
                        job.mark("read")
                        self._take(job, reasoning, choice)
        finally:
            if self._norm is not None:
                self._files.discard(id_)
        return reasoning

    def _take(self, job: Job, reasoning: _Reasoning, choice: dict[str, Any]) -> None:
        with self._decoding:
            for token in choice.get("token_ids") or []:
                reasoning.take(token, self._eos, self._stop)
            if reasoning.finish_reason is None:
                self._text.show(job, reasoning.tokens)
        reasoning.ended = choice.get("finish_reason") or reasoning.ended

    def _body(self, prompt: Sequence[int] | np.ndarray, limit: int) -> dict[str, Any]:
        return {
            "model": self._served,
            "prompt": [int(token) for token in prompt],
            "max_tokens": limit,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop": [self._stop.marker],
            "include_stop_str_in_output": True,
            "ignore_eos": True,  # of the server's configuration: the next line has this model's
            "stop_token_ids": sorted(self._eos),
            "skip_special_tokens": False,
            "return_token_ids": True,
        }

    def _state(self, tokens: list[int], job: Job) -> torch.Tensor | None:
        """The state after tokens, nearly all of which the server has in its cache; None: the model
        here is to read it."""
        if self._norm is None:
            return None
        id_ = self._files.new_id()
        try:
            answer = self._client.post(COMPLETIONS, self._reading(tokens), job, id_)
        except EngineUnavailable:
            self._files.discard(id_)
            raise
        try:
            return self._normed(self._files.read(answer, len(tokens)))
        except (OSError, ValueError) as error:
            log.warning("a state is read by the model here: %s", error)
            return None

    def _reading(self, tokens: list[int]) -> dict[str, Any]:
        return self._body(tokens, 1) | {"stop": [], "stop_token_ids": []}

    @torch.no_grad()
    def _normed(self, state: torch.Tensor) -> torch.Tensor:
        assert self._norm is not None
        weight = next(self._norm.parameters())
        normed = self._norm(state.to(weight.device, weight.dtype)[None])[0]
        assert isinstance(normed, torch.Tensor)
        return normed

    # ---- the start ------------------------------------------------------------------------------

    def _choose_weights(self, model: R2ecModel, probe: list[int]) -> None:
        """Find the name under which the server serves ``model``'s weights."""
        listed = self._client.get("/v1/models")["data"]
        base = next(one["id"] for one in listed if one.get("parent") is None)
        names = [base]
        if hasattr(model.backbone, "peft_config"):
            with contextlib.suppress(EngineUnavailable):  # it may take no adapters, or be away
                names.insert(0, self._load_adapter(model.backbone))
        differences = {}
        for self._served in names:
            differences[self._served] = self._difference(model, probe)
            if differences[self._served] <= MOST_LOG_PROB:
                if self._served == base:
                    self._unload_adapter()
                log.info(
                    "reasonings are written by the vLLM server's %r; log-probabilities differ "
                    "from this model's by %.4f on average",
                    self._served,
                    differences[self._served],
                )
                return
        raise ValueError(
            f"engine: the server at {self._client.url} serves other weights than model: its "
            f"log-probabilities differ by {differences} on average, {MOST_LOG_PROB} is the most; "
            "give it the base model with --enable-lora, --max-lora-rank and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and a folder for temporary files that both see, "
            "or the model with its adapter merged; and --logprobs-mode processed_logprobs"
        )

    def _load_adapter(self, policy: Any) -> str:
        """The adapter's name at the server, which reads it from a folder that both see."""
        self._adapter = tempfile.TemporaryDirectory(prefix="r2ec-adapter-")
        (name,) = policy.active_adapters
        policy.save_pretrained(self._adapter.name, selected_adapters=[name])
        folder = Path(self._adapter.name) / ("" if name == "default" else name)
        served = f"r2ec-{uuid.uuid4().hex}"
        try:
            self._client.post(LOAD, {"lora_name": served, "lora_path": str(folder)})
        except EngineUnavailable as error:
            log.info("the adapter was not loaded: %s", error)
            raise
        self._loaded = served
        return served

    def _unload_adapter(self) -> None:
        if self._loaded is not None:
            with contextlib.suppress(EngineUnavailable):
                self._client.post(UNLOAD, {"lora_name": self._loaded})
            self._loaded = None
        if self._adapter is not None:
            self._adapter.cleanup()
            self._adapter = None

    def _difference(self, model: R2ecModel, probe: list[int]) -> float:
        """Mean difference of log-probabilities of a text that the server writes."""
        body = self._body(probe, PROBE_TOKENS) | {"logprobs": 0, "stop": [], "stop_token_ids": []}
        answer = self._client.post(COMPLETIONS, body, id_=self._files.new_id())
        with contextlib.suppress(OSError, ValueError):
            self._files.read(answer, len(probe))  # which removes them
        (choice,) = answer["choices"]
        theirs = choice["logprobs"]["token_logprobs"]
        rollouts = assemble([Trajectory(choice["token_ids"], theirs)], self._marker)
        ours = score_rollouts(model, [probe], rollouts, temperature=1.0)[: len(theirs)]
        return float(np.abs(np.asarray(theirs, np.float32) - ours).mean())

    def _look_for_states(self, model: R2ecModel, probe: list[int]) -> None:
        """Find out whether states come from the server; the log says which."""
        tokens = [*probe, *self._marker]
        answer = self._client.post(COMPLETIONS, self._reading(tokens), id_=self._files.new_id())
        norm = getattr(model._decoder, "norm", None)
        reason = "it extracts none"
        if states_path(answer) is not None and isinstance(norm, torch.nn.Module):
            self._norm = copy.deepcopy(norm)
            try:
                theirs = self._normed(self._files.read(answer, len(tokens))).float()
                (ours,) = model.encode_rows([tokens]).float()
                cosine = float(torch.cosine_similarity(theirs, ours, dim=0))
                if cosine >= LEAST_COSINE:
                    log.info("states are read by the vLLM server")
                    return
                reason = f"the one of a first text differs (cosine {cosine:.3f}; is the layer "
                reason += "num_hidden_layers the last of those extracted?)"
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error)
            self._norm = None
        log.info("states are read by the model here, a pass a request, not by vLLM: %s", reason)


class _Reasoning:
    """A reasoning as it comes in, which ends where `ContinuousDecoder` ends one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.ended: str | None = None  # as the server calls it

    def take(self, token: int, eos: frozenset[int], stop: MarkerStop) -> None:
        if self.finish_reason is not None:
            return
        if token in eos:
            self.finish_reason = "eos"
            return
        self.tokens.append(token)
        if stop.closes(self.tokens):
            self.finish_reason = "answer"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"

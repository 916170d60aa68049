"""Rollouts on transformers: one prefill a prompt, G samples that share it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from r2ec_fast.model.hf_compat import base_causal_lm, context_limit, eval_mode
from r2ec_fast.model.prefix_cache import KnownPrefix
from r2ec_fast.packing.ragged import Rows
from r2ec_fast.rollout import stepwise
from r2ec_fast.rollout.base import Rollouts, Trajectory, assemble, check_request
from r2ec_fast.rollout.job import Job, RowEnds
from r2ec_fast.rollout.marker import MarkerStop
from r2ec_fast.rollout.noise import row_keys
from r2ec_fast.rollout.onednn_linear import MIN_STEPS, PackedLinears
from r2ec_fast.rollout.plain_decoder import PlainDecoder
from r2ec_fast.rollout.sampling import SamplingParams
from r2ec_fast.rollout.shared_prompt.decoder import SharedPromptDecoder
from r2ec_fast.rollout.static import loop as static
from r2ec_fast.rollout.static.decoder import StaticDecoder
from r2ec_fast.utils.memory import free_memory, is_out_of_memory

logger = logging.getLogger(__name__)

Decoder = SharedPromptDecoder | PlainDecoder
DECODERS: dict[str, type[Decoder]] = {
    "shared": SharedPromptDecoder,
    "static": StaticDecoder,
    "plain": PlainDecoder,
}


class TransformersEngine:
    """Samples reasonings with a Hugging Face causal LM (or a PeftModel around one).

    Args:
        model: decoder-only LM. It may be in training mode, with dropout and gradient checkpointing:
            generation runs in eval mode without gradients and puts everything back.
        tokenizer: its tokenizer; used to recognise the marker in the decoded tail.
        marker: text that ends a reasoning.
        marker_ids: tokens appended where the marker is missing; default: the marker tokenized
            alone.
        eos_token_ids: tokens that end a text; default: those of the generation config and the
            tokenizer.
        decoder: "shared" (prompt cache stored and read once for all samples), "static" (as shared,
            in steps that a CUDA graph replays), "plain" (the model's own cache and attention; any
            architecture), or "auto" (see `choose_decoder`).
        max_tokens_in_flight: bound on cached tokens; `generate` splits the prompts into batches by
            it, with at least one prompt a batch. Where memory runs out it is lowered, with a
            warning, and the call done again: the samples stay the same.
        prefix: what prompts begin with, for weights that stay: the shared decoder does not compute
            it again.
        keep_packed: keep the reordered weights of decoding on CPUs (see `packed`) from one call to
            the next, for the memory of one more set of weights; they follow the weights.

    Raises:
        ValueError: the marker tokenizes to nothing, or the decoder cannot run this model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        marker: str = "<answer>",
        marker_ids: Sequence[int] | None = None,
        *,
        eos_token_ids: Sequence[int] | None = None,
        decoder: str = "auto",
        max_tokens_in_flight: int = 65536,
        prefix: KnownPrefix | None = None,
        keep_packed: bool = False,
    ) -> None:
        self.prefix = prefix
        self._packed = PackedLinears(model) if keep_packed else None
        self.model = model
        self.tokenizer = tokenizer
        self.stop = MarkerStop(tokenizer, marker)
        if marker_ids is None:
            marker_ids = tokenizer.encode(marker, add_special_tokens=False)
        self.marker_ids = [int(token) for token in marker_ids]
        if not self.marker_ids:
            raise ValueError(f"marker_ids must hold at least one token; marker is {marker!r}")
        if eos_token_ids is None:
            eos_token_ids = default_eos(model, tokenizer)
        self.decoder = choose_decoder(model, decoder)
        self.max_tokens_in_flight = max_tokens_in_flight
        self.eos_token_ids = frozenset(int(token) for token in eos_token_ids)

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
        max_tokens_in_flight: int | None = None,
    ) -> Rollouts:
        """Sample `num_generations` completions of every prompt.

        Samples depend on (seed, step, user key, sample index, token position) alone, not on which
        prompts share a batch, up to the rounding of the model's own products.

        Args:
            prompts: B rows of token ids: Ragged, or a sequence of rows.
            user_keys: B integers that name the examples; the key of the noise.
            num_generations: G.
            max_completion_length: most tokens SAMPLED per completion; an appended marker comes on
                top.
            temperature: > 0; also the temperature of the returned log-probabilities.
            top_k: draw among the k best tokens; 0 = the whole vocabulary.
            seed: run seed.
            step: training step, so that the same user gets new samples at the next step.
            greedy: arg-max instead of a draw (log-probabilities still at `temperature`).
            states: also return the state at each row's last token. The cache holds what comes
                before, so this costs a step for each token that the row has not read: the one that
                ends it, or the appended marker.
            max_tokens_in_flight: for this call, in place of the engine's own.

        Returns:
            Rollouts of B * G rows, in the order of the prompts.

        Raises:
            ValueError: an empty prompt, keys that do not match, sizes out of range, or a prompt
                which with its completion exceeds the model's positions.
            MemoryError: the rollout of one prompt does not fit.
        """
        prompts = check_request(prompts, user_keys, num_generations, max_completion_length)
        budget = self.max_tokens_in_flight if max_tokens_in_flight is None else max_tokens_in_flight
        if budget < 1:
            raise ValueError(f"max_tokens_in_flight must be >= 1, got {budget}")
        # a row that runs out of length has yet to read its last token and the marker
        room = max_completion_length + (1 + len(self.marker_ids) if states else 0)
        self._check_positions(prompts.lengths, room)
        params = SamplingParams(temperature, top_k, greedy)
        ends = RowEnds(self.stop, self.marker_ids, self.eos_token_ids)
        keys = row_keys(user_keys, num_generations, seed=seed, step=step)
        decoder = DECODERS[self.decoder](self.model, self.prefix)
        lengths = prompts.lengths.tolist()
        while True:
            plan = list(decoder.batches(lengths, num_generations, room, budget))
            job = Job(prompts, keys, num_generations, max_completion_length, room, params, ends)
            try:
                return self._run(decoder, plan, job)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if max(map(len, plan)) == 1:
                    raise MemoryError(
                        f"the rollout of one prompt does not fit ({error}); lower num_generations, "
                        "max_completion_length or the prompts' window"
                    ) from error
            free_memory()
            budget = max(
                sum(lengths[i] + num_generations * room for i in batch) // 2 for batch in plan
            )
            self.max_tokens_in_flight = min(self.max_tokens_in_flight, budget)
            logger.warning("out of memory in a rollout: max_tokens_in_flight is now %d", budget)

    def _run(self, decoder: Decoder, plan: list[list[int]], job: Job) -> Rollouts:
        rows, group = [Trajectory() for _ in job.keys], job.num_generations
        packed, steps = self._packed, MIN_STEPS
        if packed is None:
            packed, steps = PackedLinears(self.model), len(plan) * job.max_completion_length
        with (
            torch.no_grad(),
            eval_mode(self.model),
            decoder.session(),
            packed.installed(steps),
            newest_states(self.model) as newest,
        ):
            for batch in plan:
                index = [i * group + g for i in batch for g in range(group)]
                own = [rows[r] for r in index]
                logits = decoder.start(job.prompts.select(batch), group, job.room)
                if isinstance(decoder, StaticDecoder):
                    static.decode(decoder, logits, own, job.keys[index], job, newest)
                else:
                    stepwise.decode(decoder, logits, own, job.keys[index], job, newest)
        return assemble(rows, self.marker_ids)

    def _check_positions(self, lengths: np.ndarray, max_completion_length: int) -> None:
        limit = context_limit(base_causal_lm(self.model).config)
        longest = lengths.max(initial=0)
        if limit is not None and longest + max_completion_length > limit:
            raise ValueError(
                f"the longest prompt ({longest} tokens) plus max_completion_length "
                f"({max_completion_length}) exceeds the model's {limit} positions"
            )


@contextmanager
def newest_states(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yields a list that holds, after each pass of `model`, the states after the final norm of each
    row's newest token, [n, d]."""
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: tuple, out: Any) -> None:
        kept[:] = [out.last_hidden_state[:, -1]]

    handle = base_causal_lm(model).get_decoder().register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def choose_decoder(model: nn.Module, decoder: str = "auto") -> str:
    """Name of the decoder to run; "auto": "shared" where it knows the architecture, else "plain".
    "static" is to be asked for: no graph of it has run on a GPU yet.

    Raises:
        ValueError: an unknown name, or "static" or "shared" for a model it cannot run.
    """
    if decoder not in ("auto", *DECODERS):
        raise ValueError(f"decoder must be one of auto, {', '.join(DECODERS)}, got {decoder!r}")
    if decoder == "plain":
        return decoder
    kind = StaticDecoder if decoder == "static" else SharedPromptDecoder
    reason = kind.refuses(model)
    if decoder != "auto":
        if reason is not None:
            raise ValueError(f"decoder {decoder!r} cannot run this model: {reason}")
        return decoder
    if reason is not None:
        logger.warning("rollouts use the slower plain decoder: %s", reason)
        return "plain"
    return "shared"


def default_eos(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    generation = getattr(base_causal_lm(model), "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    ids = [] if found is None else [found] if isinstance(found, int) else list(found)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids

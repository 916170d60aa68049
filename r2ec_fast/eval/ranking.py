"""From prompts to user states and ranks, with or without a written reasoning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from r2ec_fast.packing.ragged import Ragged, Rows

if TYPE_CHECKING:
    from r2ec_fast.data import Examples, RecDataset
    from r2ec_fast.model.prefix_cache import KnownPrefix
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.prompts.builder import PromptBuilder
    from r2ec_fast.prompts.segments import PromptAssembler
    from r2ec_fast.rollout import RolloutEngine, TransformersEngine, VLLMServerEngine


@dataclass(frozen=True)
class UserStates:
    """Read-outs of B users: ``states`` [B, d]; ``reasoning``: B rows, the tokens written for each
    (marker included), empty in direct mode; ``finish_reason``: as the engine gave it, or
    "direct"."""

    states: torch.Tensor
    reasoning: Ragged
    finish_reason: list[str]


def transformers_engine(
    model: R2ecModel,
    builder: PromptBuilder,
    *,
    max_tokens_in_flight: int = 65536,
    prefix: KnownPrefix | None = None,
    keep_packed: bool = False,
) -> TransformersEngine:
    """The engine that writes reasonings with ``model`` itself."""
    from r2ec_fast.rollout import TransformersEngine

    return TransformersEngine(
        model.backbone,
        model.tokenizer,
        marker=model.prompts.emb_token,
        marker_ids=builder.marker_ids,
        max_tokens_in_flight=max_tokens_in_flight,
        prefix=prefix,
        keep_packed=keep_packed,
    )


def server_engine(
    model: R2ecModel, builder: PromptBuilder, url: str, *, max_tokens: int
) -> VLLMServerEngine:
    """The engine that has a vLLM server write reasonings with ``model``'s adapters. Sampled
    log-probabilities are those of ``model`` itself, by a pass of ``max_tokens`` tokens at a time.

    Raises RolloutServerError where no server answers at ``url``.
    """
    from r2ec_fast.rollout import VLLMServerEngine, score_rollouts

    return VLLMServerEngine(
        url,
        None,
        model.tokenizer,
        marker=model.prompts.emb_token,
        marker_ids=builder.marker_ids,
        policy=model.backbone,
        scorer=lambda prompts, rollouts, temperature: score_rollouts(
            model, prompts, rollouts, temperature=temperature, max_tokens=max_tokens
        ),
    )


@torch.no_grad()
def user_states(
    model: R2ecModel,
    builder: PromptBuilder,
    prompts: Rows,
    *,
    engine: RolloutEngine | None = None,
    max_completion_length: int = 512,
    max_tokens: int = 8192,
    prefix: KnownPrefix | None = None,
) -> UserStates:
    """Read-outs of user prompts (token ids).

    With an ``engine`` a greedy reasoning of at most ``max_completion_length`` tokens is written
    first; without one the state is read right after the prompt and the marker (direct mode).
    ``max_tokens`` bounds a forward pass; a ``prefix`` of the prompts is not computed again.
    """
    prompts = Ragged.of(prompts, "prompts")
    if engine is None:
        reasoning = Ragged.of([[]] * len(prompts))
        rows = prompts.append(builder.marker_ids)
        finish = ["direct"] * len(rows)
    else:
        rollouts = engine.generate(
            prompts,
            user_keys=range(len(prompts)),
            num_generations=1,
            max_completion_length=max_completion_length,
            temperature=1.0,
            top_k=0,
            seed=0,
            step=0,
            greedy=True,
            states=True,
        )
        reasoning, finish = rollouts.tokens, rollouts.finish_reason
        if rollouts.states is not None:
            return UserStates(rollouts.states, reasoning, finish)
        rows = prompts.join(reasoning)
    return UserStates(model.encode_rows(rows, max_tokens, prefix), reasoning, finish)


@torch.no_grad()
def rank_examples(
    model: R2ecModel,
    assembler: PromptAssembler,
    dataset: RecDataset,
    examples: Examples,
    *,
    engine: RolloutEngine | None = None,
    max_completion_length: int = 512,
    max_tokens: int = 8192,
    exclude_window: bool = False,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank (from 1) and log-probability of each example's target in the whole catalog.

    The items of the user's earlier events are excluded (``exclude_window``: only those shown). The
    item table is ``model.index`` as it stands. Returns (rank int64 [X], log_prob float32 [X]);
    raises RuntimeError where the model has no item table. ``progress`` is called with the number
    of examples done in each batch.
    """
    window = model.prompts.window
    ranks, log_probs = [], []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        users = user_states(
            model,
            assembler.builder,
            assembler.example_rows(dataset, part),
            engine=engine,
            max_completion_length=max_completion_length,
            max_tokens=max_tokens,
        )
        stats = model.target_stats(
            users.states,
            torch.from_numpy(dataset.target(part)).to(model.device),
            exclude=dataset.exclude(part, window if exclude_window else None),
        )
        ranks.append(stats.rank.cpu().numpy())
        log_probs.append(stats.log_prob.cpu().numpy())
        if progress is not None:
            progress(len(part))
    if not ranks:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    return np.concatenate(ranks), np.concatenate(log_probs)

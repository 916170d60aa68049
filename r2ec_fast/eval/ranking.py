"""From prompts to user states and ranks, with or without a written reasoning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from r2ec_fast.model.hf_compat import eval_mode
from r2ec_fast.packing.packer import pack_histories
from r2ec_fast.packing.ragged import Ragged, Rows

if TYPE_CHECKING:
    from r2ec_fast.data import Examples, RecDataset
    from r2ec_fast.model.prefix_cache import KnownPrefix
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.prompts.builder import PromptBuilder
    from r2ec_fast.prompts.segments import PromptAssembler
    from r2ec_fast.rollout import RolloutEngine, TransformersEngine, VLLMServerEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UserStates:
    """Read-outs of B users: ``states`` [B, d]; ``reasoning``: B rows, the tokens written for each
    (marker included), empty in direct mode; ``finish_reason``: as the engine gave it, or
    "direct"."""

    states: torch.Tensor
    reasoning: Ragged
    finish_reason: list[str]

    def finite(self) -> torch.Tensor:
        """bool [B]: whether all numbers of a state are finite."""
        return torch.isfinite(self.states).all(1)


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
def states_after(
    model: R2ecModel, prompts: Rows, reasonings: Rows, *, max_tokens: int = 8192
) -> torch.Tensor:
    """Read-outs of B prompts after given reasonings, [B * G, d] (all token ids).

    Row r of the B * G ``reasonings`` follows prompt r // G and ends with the marker, as what an
    engine writes does; so it may be the user's own reasoning, another user's, or any text. A prompt
    is computed once for its G reasonings. ``max_tokens`` bounds a forward pass; a prompt that does
    not fit with its reasonings runs alone.

    Raises ValueError where the rows do not come to G a prompt, or a reasoning does not end with the
    marker.
    """
    prompts, reasonings = Ragged.of(prompts, "prompts"), Ragged.of(reasonings, "reasonings")
    group = reasonings_per_prompt(len(prompts), reasonings)
    _check_ends(model, reasonings)
    if group == 1:
        return model.encode_rows(prompts.join(reasonings), max_tokens)
    batches = pack_histories(
        prompts, reasonings, num_generations=group, max_tokens=max_tokens, oversize="alone"
    )
    groups = torch.cat([batch.groups for batch in batches])
    with eval_mode(model):
        states = torch.cat([model(batch)[batch.readout.to(model.device)] for batch in batches])
    return states.unflatten(0, (-1, group))[groups.argsort().to(model.device)].flatten(0, 1)


def reasonings_per_prompt(prompts: int, reasonings: Ragged) -> int:
    """G, the rows of ``reasonings`` that each of so many prompts has; ValueError where it is not a
    whole number of at least one."""
    group = len(reasonings) // max(prompts, 1)
    if len(reasonings) != prompts * max(group, 1):
        raise ValueError(
            f"reasonings: expected the same number of rows, at least one, for each of {prompts} "
            f"prompts, got {len(reasonings)} rows"
        )
    return max(group, 1)


def _check_ends(model: R2ecModel, reasonings: Ragged) -> None:
    from r2ec_fast.rollout.marker import MarkerStop

    stop = MarkerStop(model.tokenizer, model.prompts.emb_token)
    for row, tokens in enumerate(reasonings):
        if not len(tokens) or not stop.closes(tokens.tolist()):
            raise ValueError(
                f"reasonings: expected rows that end with the marker {stop.marker!r} (append "
                f"PromptBuilder.marker_ids), got row {row} that does not"
            )


class TopItems:
    """Collects the k best items of every row that :func:`rank_examples` reports (``on_states``).

    A target that the user had before is excluded here as any other item is; with ``include``
    (bool [N]) the lists hold no other items than those.
    """

    def __init__(self, model: R2ecModel, k: int, include: np.ndarray | None = None) -> None:
        self.model, self.k = model, k
        self.include = None if include is None else torch.from_numpy(include)
        self._found: list[np.ndarray] = []

    def __call__(self, states: torch.Tensor, exclude: Ragged) -> None:
        finite = torch.isfinite(states).all(1)
        states = torch.where(finite[:, None], states, 0.0)
        found = self.model.top_items(states, self.k, exclude.tensors(), self.include).indices
        # a state that is no number names nothing: its list is the first items left, as ties rank
        self._found.append(found.cpu().numpy())

    @property
    def lists(self) -> np.ndarray:
        """int64 [X * G, k], best first; -1 where fewer items are left."""
        return np.concatenate([np.empty((0, self.k), np.int64), *self._found])


@torch.no_grad()
def rank_examples(
    model: R2ecModel,
    assembler: PromptAssembler,
    dataset: RecDataset,
    examples: Examples,
    *,
    engine: RolloutEngine | None = None,
    reasonings: Rows | None = None,
    max_completion_length: int = 512,
    max_tokens: int = 8192,
    exclude_window: bool = False,
    include: np.ndarray | torch.Tensor | None = None,
    batch_size: int = 64,
    allow_non_finite: bool = False,
    progress: Callable[[int], object] | None = None,
    on_states: Callable[[torch.Tensor, Ragged], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank (from 1) and log-probability of each example's target in the whole catalog.

    The state that is ranked with is read after a greedy reasoning that ``engine`` writes, or after
    the given ``reasonings``, or right after the prompt (neither: direct mode). Given are X * G rows
    of token ids, G an example, each ending with the marker (:func:`states_after`): an example's
    own, those of other users (:func:`~r2ec_fast.eval.reasoning.other_users`), or a control that
    says nothing, such as ``Ragged.of([[dot] * n for n in lengths]).append(builder.marker_ids)``.

    The items of the user's earlier events are excluded (``exclude_window``: only those shown). With
    ``include`` a target is ranked among those items alone, such as the ones of a category or in
    stock: internal ids int64 [S], or a mask of the catalog, bool [N]; the target itself competes
    always. The item table is ``model.index`` as it stands. ``progress`` is called with the number
    of examples done in each batch, ``on_states`` with each batch's user states [b * G, d] and the
    items excluded for them, b * G rows (:class:`TopItems` makes lists of them). Returns (rank int64
    [X * G], log_prob float32 [X * G]); G is 1 unless ``reasonings`` are more.

    Raises RuntimeError where the model has no item table, and ValueError for ``reasonings`` that
    are not these or come with an engine, and with their number where user states hold NaN or
    infinity; with ``allow_non_finite`` it is logged, and those targets rank last.
    """
    if engine is not None and reasonings is not None:
        raise ValueError("reasonings: expected none beside an engine, which writes its own")
    given = None if reasonings is None else Ragged.of(reasonings, "reasonings")
    group = 1 if given is None else reasonings_per_prompt(len(examples), given)
    window = model.prompts.window
    ranks, log_probs, non_finite = [], [], 0
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        prompts = assembler.example_rows(dataset, part)
        if given is None:
            states = user_states(
                model,
                assembler.builder,
                prompts,
                engine=engine,
                max_completion_length=max_completion_length,
                max_tokens=max_tokens,
            ).states
        else:
            rows = given[start * group : (start + len(part)) * group]
            states = states_after(model, prompts, rows, max_tokens=max_tokens)
        non_finite += int((~torch.isfinite(states).all(1)).sum())
        exclude = Ragged.of(dataset.exclude(part, window if exclude_window else None))
        exclude = exclude.select(np.arange(len(part)).repeat(group))
        if on_states is not None:
            on_states(states, exclude)
        stats = model.target_stats(
            states,
            torch.from_numpy(dataset.target(part).repeat(group)).to(model.device),
            exclude=exclude.tensors(),
            include=include,
        )
        ranks.append(stats.rank.cpu().numpy())
        log_probs.append(stats.log_prob.cpu().numpy())
        if progress is not None:
            progress(len(part))
    if non_finite:
        text = f"model: {non_finite} of {len(examples) * group} user states hold NaN or infinity"
        if not allow_non_finite:
            raise ValueError(
                f"{text}; its numbers would mean nothing (allow_non_finite ranks them)"
            )
        log.warning("%s; their targets rank last", text)
    if not ranks:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    return np.concatenate(ranks), np.concatenate(log_probs)

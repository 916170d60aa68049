"""What every rollout engine returns, and the protocol it follows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from r2ec_fast.packing.ragged import Ragged, Rows


@dataclass(frozen=True)
class Rollouts:
    """B * G sampled reasonings, ragged. Row r is sample `r % G` of prompt `r // G`.

    A row holds the completion alone: the sampled tokens, ending with the marker. The marker was
    sampled (finish reason "answer"), or it was appended, because an end-of-text token was drawn
    ("eos"; that token is dropped) or the length ran out ("length").

    Attributes:
        values: int64 [E], token ids.
        offsets: int64 [B * G + 1]; row r is `values[offsets[r]:offsets[r + 1]]`, never empty.
        sampled: bool [E], False for appended marker tokens.
        log_prob: float32 [E], log-probability under the sampling temperature and the full
            vocabulary; 0 where not sampled.
        finish_reason: B * G of "answer", "eos", "length".
        sampler_log_prob: float32 [E] as the sampling engine reported it, where `log_prob` was
            computed by another model (for an importance correction); else None.
        states: [B * G, d], the model's state after the final norm at each row's last token, where
            it was asked for and the engine can tell; else None.
    """

    values: np.ndarray
    offsets: np.ndarray
    sampled: np.ndarray
    log_prob: np.ndarray
    finish_reason: list[str]
    sampler_log_prob: np.ndarray | None = None
    states: torch.Tensor | None = None

    @property
    def targets(self) -> np.ndarray:
        """int64 [E]: `values`, with -100 (no loss) at appended marker tokens."""
        return np.where(self.sampled, self.values, np.int64(-100))

    @property
    def tokens(self) -> Ragged:
        """The B * G rows of token ids."""
        return Ragged(self.values, self.offsets)

    def __len__(self) -> int:
        return len(self.finish_reason)

    def row(self, index: int) -> np.ndarray:
        """int64 [R_index]: the tokens of one row."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class RolloutEngine(Protocol):
    """G reasonings for each prompt. See `TransformersEngine.generate` for the arguments."""

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
    ) -> Rollouts: ...


@dataclass
class Trajectory:
    """One row while it grows."""

    tokens: list[int] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    finish_reason: str = "length"
    state: torch.Tensor | None = None  # [d], at the token that ends it, marker included


def assemble(rows: Sequence[Trajectory], marker_ids: Sequence[int]) -> Rollouts:
    """Close every row with the marker and lay the rows end to end."""
    tail = [] if not rows else list(marker_ids)
    values, sampled, log_prob, lengths = [], [], [], []
    for row in rows:
        added = [] if row.finish_reason == "answer" else tail
        values += row.tokens + added
        sampled += [True] * len(row.tokens) + [False] * len(added)
        log_prob += row.log_prob + [0.0] * len(added)
        lengths.append(len(row.tokens) + len(added))
    states = [row.state for row in rows if row.state is not None]
    return Rollouts(
        values=np.asarray(values, np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        sampled=np.asarray(sampled, bool),
        log_prob=np.asarray(log_prob, np.float32),
        finish_reason=[row.finish_reason for row in rows],
        states=torch.stack(states) if states else None,
    )


def check_request(
    prompts: Rows, user_keys: Sequence[int], num_generations: int, max_completion_length: int
) -> Ragged:
    """The prompts of a call of `generate`; ValueError where its arguments do not fit together."""
    if num_generations < 1:
        raise ValueError(f"num_generations must be >= 1, got {num_generations}")
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length must be >= 1, got {max_completion_length}")
    if len(user_keys) != len(prompts):
        raise ValueError(
            f"user_keys must have one key a prompt: {len(prompts)} prompts, {len(user_keys)} keys"
        )
    rows = Ragged.of(prompts if isinstance(prompts, Ragged) else list(prompts), "prompts")
    for index in np.flatnonzero(rows.lengths == 0)[:1]:
        raise ValueError(f"prompts[{index}] is empty; a prompt needs at least one token")
    return rows

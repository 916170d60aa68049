"""What a call of `generate` asks for, and where a row of it ends."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor

from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.rollout.base import Trajectory
from r2ec_fast.rollout.marker import MarkerStop
from r2ec_fast.rollout.sampling import SamplingParams


class RowEnds(NamedTuple):
    """The ends of a row: the marker in its text, or a token that ends a text."""

    stop: MarkerStop
    marker_ids: Sequence[int]
    eos_token_ids: Collection[int]

    def goes_on(self, row: Trajectory, token: int, log_prob: float) -> bool:
        """Add a sampled token to a row; False, with the row's finish reason, where it ends it."""
        if token in self.eos_token_ids:
            row.finish_reason = "eos"
            return False
        row.tokens.append(token)
        row.log_prob.append(log_prob)
        if self.stop.closes(row.tokens):
            row.finish_reason = "answer"
            return False
        return True

    def unread(self, row: Trajectory) -> list[int]:
        """What a finished row has not read: its last token, the marker that is appended to it."""
        last = [] if row.finish_reason == "eos" else row.tokens[-1:]
        return last if row.finish_reason == "answer" else [*last, *self.marker_ids]


class Job(NamedTuple):
    """The rows that a call of `generate` asks for."""

    prompts: Ragged
    keys: Tensor  # int64 [B * G]
    num_generations: int
    max_completion_length: int
    room: int  # cached tokens of a completion
    params: SamplingParams
    ends: RowEnds

    @property
    def wants_states(self) -> bool:
        return self.room > self.max_completion_length

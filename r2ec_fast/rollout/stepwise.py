"""Sampling with the host in every step: finished rows leave the batch at once."""

import itertools
from typing import Protocol

import torch
from torch import Tensor

from r2ec_fast.rollout.base import Trajectory
from r2ec_fast.rollout.job import Job
from r2ec_fast.rollout.sampling import sample_tokens


class Steps(Protocol):
    """A decoder after its prefill."""

    def step(self, tokens: Tensor, keep: Tensor | None) -> Tensor: ...


def decode(
    decoder: Steps,
    logits: Tensor,
    rows: list[Trajectory],
    keys: Tensor,
    job: Job,
    newest: list[Tensor],
) -> None:
    """Sample until every row is finished. A finished row leaves the batch at once, or, where states
    are wanted, when it has read its own end.

    Args:
        decoder: has read the prompts of the rows.
        logits: [n, V] after the prompts.
        rows: n, empty; they are filled.
        keys: int64 [n], see `noise.row_keys`.
        newest: holds the newest states [n, d] after each step, see `newest_states`.
    """
    keys = keys.to(logits.device)
    unread: list[list[int] | None] = [None] * len(rows)  # of a finished row
    for position in itertools.count():
        if None in unread:
            drawn = sample_tokens(logits, keys, position, job.params)
            tokens, log_probs = drawn.tokens.tolist(), drawn.log_prob.tolist()
        last = position + 1 >= job.max_completion_length
        alive = []
        for local, row in enumerate(rows):
            rest = unread[local]
            if rest is None:
                goes_on = job.ends.goes_on(row, tokens[local], log_probs[local])
                if not goes_on or last:
                    rest = unread[local] = job.ends.unread(row) if job.wants_states else []
            if rest is None:
                alive.append(local)
            elif rest:
                tokens[local] = rest.pop(0)
                alive.append(local)
        if not alive:
            return
        keep = None
        if len(alive) < len(rows):
            keep = torch.tensor(alive, device=logits.device)
            keys = keys[keep]
            rows, unread = [rows[i] for i in alive], [unread[i] for i in alive]
            tokens = [tokens[i] for i in alive]
        logits = decoder.step(torch.tensor(tokens, device=logits.device), keep)
        for row, rest, state in zip(rows, unread, newest[0], strict=True):
            if rest == []:  # it has read its last token
                row.state = state

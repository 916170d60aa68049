"""Sampling in steps that the host does not look at, but for a glance every few tokens."""

from torch import Tensor

from r2ec_fast.rollout.base import Trajectory
from r2ec_fast.rollout.job import Job
from r2ec_fast.rollout.static.decoder import StaticDecoder
from r2ec_fast.rollout.static.slots import Slots
from r2ec_fast.rollout.static.stepper import Stepper

STOP_EVERY = 8  # tokens between two looks for rows that are finished


def decode(
    decoder: StaticDecoder,
    logits: Tensor,
    rows: list[Trajectory],
    keys: Tensor,
    job: Job,
    newest: list[Tensor],
) -> None:
    """Sample until every row is finished. What a row draws behind its end is dropped, so the rows
    are those of `stepwise.decode`, whose arguments these are."""
    slots = Slots(decoder, keys.to(logits.device), job, newest)
    stepper = Stepper(slots.step, logits.device)
    slots.draw(logits)
    alive = list(range(len(rows)))
    drawn = seen = 0
    while alive and seen < job.max_completion_length:
        if drawn:
            stepper()
        drawn += 1
        if drawn % STOP_EVERY == 0 or drawn == job.max_completion_length:
            tokens, log_probs = slots.read(seen, drawn)
            alive = [
                r
                for r in alive
                if all(
                    job.ends.goes_on(rows[r], *one)
                    for one in zip(tokens[r], log_probs[r], strict=True)
                )
            ]
            seen = drawn
    if job.wants_states:
        _read_ends(slots, stepper, rows, job)


def _read_ends(slots: Slots, stepper: Stepper, rows: list[Trajectory], job: Job) -> None:
    """Every row goes back to its end and reads what it has not read; its state is that after the
    last token, which it reads again until all rows are there."""
    unread = [job.ends.unread(row) for row in rows]
    # place of the first of them among the row's own tokens
    first = [len(row.tokens) - (row.finish_reason != "eos") for row in rows]
    for position in range(max(map(len, unread))):
        at = [min(position, len(rest) - 1) for rest in unread]
        slots.place(
            [rest[i] for rest, i in zip(unread, at, strict=True)],
            [start + i for start, i in zip(first, at, strict=True)],
        )
        stepper()
    assert slots.state is not None
    for row, state in zip(rows, slots.state, strict=True):
        row.state = state

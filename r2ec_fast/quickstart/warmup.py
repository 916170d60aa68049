"""The warm-up: a model made from nothing learns the language of its world before RecPO.

A record is a reasoning about the history before a training example, and maybe the item that the
item head should read from it. :func:`write_records` makes them; no purchase is a target in them.
:func:`learn` is any training on such records: it knows nothing of the world.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import get_cosine_schedule_with_warmup

from r2ec_fast.data.types import Examples
from r2ec_fast.packing.packer import PackedBatch, pack_histories
from r2ec_fast.packing.ragged import Ragged, common_prefix
from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.quickstart.reasoning import write_chain
from r2ec_fast.quickstart.world import ORDERS, World
from r2ec_kernels import linear_logprob

if TYPE_CHECKING:
    from r2ec_fast.data import RecDataset
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.prompts.builder import PromptBuilder

MAX_TOKENS = 8192  # of one pass over item prompts
BETAS = (0.9, 0.99)  # of AdamW
SCHEDULE_WARMUP = 30  # steps


class Record(NamedTuple):
    """One lesson.

    Args:
        user: internal id.
        position: of an event of that user; the prompt shows what came before it.
        text: the reasoning that follows the prompt, without the marker.
        item: internal id of what the item head reads after the marker; None: nothing is read.
    """

    user: int
    position: int
    text: str
    item: int | None = None


class Loss(NamedTuple):
    """Means over a step, in nats: of a token's negative log-probability, and of an item's among the
    step's items (NaN where no record has one)."""

    token: float
    item: float


def write_records(
    world: World, dataset: RecDataset, count: int, *, items_from: int, seed: int
) -> list[Record]:
    """``count`` records: chains of 0 to the world's number of steps, in both orders, each alike.

    Which order and which number of steps predicts purchases is left open: that is for RecPO to find
    out. From record ``items_from`` on each has an item: the product that the chain ends at, in any
    colour.
    """
    rng = np.random.default_rng([seed, 2])
    chosen = dataset.train[rng.integers(0, len(dataset.train), count)]
    records = []
    for i, (user, position) in enumerate(zip(chosen.user, chosen.position, strict=True)):
        user, position = int(user), int(position)
        history = dataset.history(user, position, world.steps).items
        steps, order = int(rng.integers(world.steps + 1)), ORDERS[rng.integers(len(ORDERS))]
        chain = world.chain(history, steps=steps, order=order)
        item = chain.end * world.colours + int(rng.integers(world.colours))
        records.append(
            Record(user, position, write_chain(chain), item if i >= items_from else None)
        )
    return records


def learn(
    model: R2ecModel,
    dataset: RecDataset,
    records: Sequence[Record],
    *,
    batch_size: int,
    learning_rate: float,
    on_step: Callable[[int, Loss], object] | None = None,
) -> list[Loss]:
    """Train every weight of ``model`` on ``records``, in their order, once.

    A step's loss is the mean cross-entropy of the tokens of reasoning and marker, plus that of the
    items among the step's distinct items, read out at the marker; both come from one pass.

    Args:
        model: is changed.
        dataset: whose users the records are about.
        records: what to learn; the last ones that do not fill a step are left out.
        batch_size: records in a step.
        learning_rate: at its peak; the schedule is a cosine.
        on_step: called with the step's number, from 1, and its loss.

    Returns:
        The loss of each step.

    Raises:
        ValueError: fewer records than one step needs.
    """
    steps = len(records) // batch_size
    if not steps:
        raise ValueError(f"records: expected at least {batch_size}, a step's, got {len(records)}")
    builder = model.prompt_builder(dataset.data.catalog)
    assembler = PromptAssembler(builder)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=0.0
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(SCHEDULE_WARMUP, steps // 4), steps)
    model.train()
    losses = []
    for step in range(steps):
        part = records[step * batch_size : (step + 1) * batch_size]
        users, positions, texts, items = zip(*part, strict=True)
        prompts = assembler.example_rows(dataset, Examples(np.array(users), np.array(positions)))
        tokens = builder.tokenizer(list(texts), add_special_tokens=False).input_ids
        written = Ragged.of(tokens).append(builder.marker_ids)
        losses.append(_accumulate(model, builder, prompts, written, items))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step + 1, losses[-1])
    return losses


def _accumulate(
    model: R2ecModel,
    builder: PromptBuilder,
    prompts: Ragged,
    written: Ragged,
    items: Sequence[int | None],
) -> Loss:
    """Add the gradient of one step: B ``prompts``, what is ``written`` after each, and ``items``
    to read."""
    batch, of_text = _pack(prompts, written)
    hidden = model(batch)
    states = hidden.index_select(0, batch.predict_from[of_text])
    targets = batch.targets[of_text]
    token_loss = -linear_logprob(states, model.lm_head_weight, targets).log_prob.mean()
    reading = np.array([item is not None for item in items])
    if not reading.any():
        token_loss.backward()
        return Loss(token_loss.item(), float("nan"))
    read = hidden[batch.readout[torch.from_numpy(reading)]]
    item_loss = _item_loss(model, builder, read, [i for i in items if i is not None])
    (token_loss + item_loss).backward()
    return Loss(token_loss.item(), item_loss.item())


def _pack(prompts: Ragged, written: Ragged) -> tuple[PackedBatch, torch.Tensor]:
    """One packed batch in which the instruction, which all prompts begin with, stands once; and
    which of its targets are of ``written``, bool."""
    shared = common_prefix(prompts)
    histories = prompts.tail(shared)
    rows = histories.join(written)
    (batch,) = pack_histories(
        [prompts[0][:shared]], rows, num_generations=len(rows), max_tokens=1, oversize="alone"
    )
    parts = np.stack([histories.lengths, written.lengths], axis=1)
    of_text = np.repeat(np.tile([False, True], len(rows)), parts.ravel())
    return batch, torch.from_numpy(of_text)[batch.source]


def _item_loss(
    model: R2ecModel, builder: PromptBuilder, states: torch.Tensor, items: Sequence[int]
) -> torch.Tensor:
    """Mean cross-entropy of ``items`` given ``states`` [B, d], among the distinct ones."""
    distinct, targets = np.unique(items, return_inverse=True)
    table = model.read_out(builder.items_ids(distinct.tolist()), max_tokens=MAX_TOKENS)
    scores = normalize(states, dim=1) @ normalize(table, dim=1).T / model.temperature
    return cross_entropy(scores, torch.from_numpy(targets))

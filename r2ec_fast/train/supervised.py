"""The language warm start (objective "reasoning_sft"): given reasonings are learned word by word.

A record is a prompt, a reasoning with the marker behind it, and an item. The loss has three terms,
of which one forward pass over packed records gives the first two:

- the cross-entropy of the tokens of reasoning and marker, a mean over the step's tokens (the
  prompt's are no targets);
- that of the item among the step's candidates, read out at the marker's last token: a mean over the
  step's records, times ``item_weight``;
- the same without the reasoning, as direct mode reads it out, times ``direct_weight``.

The counts are those of the whole step and all processes, as in `update`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from r2ec_fast.data import RecDataset
from r2ec_fast.data.reasonings import Reasonings
from r2ec_fast.data.templates import ReasoningTemplates
from r2ec_fast.packing.packer import PackedBatch, pack_histories
from r2ec_fast.packing.ragged import Ragged, common_prefix
from r2ec_fast.train import distributed
from r2ec_fast.train.batches import Candidates, ItemRows, UpdateStats, UserBatch
from r2ec_fast.train.fault_tolerance import together
from r2ec_fast.train.update import PolicyUpdate
from r2ec_kernels import linear_logprob

if TYPE_CHECKING:
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.prompts.builder import PromptBuilder

IGNORED = -100
ROWS_PER_BLOCK = 256  # of [rows, vocabulary], for the accuracy
SMALLER_RECORD = (
    "a prompt with its reasoning, {tokens} tokens, does not fit alone; lower the prompts' window "
    "or max_user_tokens, or set gradient_checkpointing"
)


def reasonings_of(
    config: RecPOConfig, data: RecDataset, given: Reasonings | None
) -> Reasonings | None:
    """The records that a run trains on: ``given``, or those of ``config.reasonings``; None for
    another objective. Raises ValueError where there are none, or both."""
    if config.objective != "reasoning_sft":
        if given is not None:
            raise ValueError(
                f"reasonings: only for objective 'reasoning_sft', got {config.objective!r}"
            )
        return None
    wanted = config.reasonings
    if (given is None) == (wanted is None):
        raise ValueError(
            "reasonings: objective 'reasoning_sft' needs a file or templates in the settings, or "
            f"Reasonings as an argument of the trainer; got {'both' if wanted else 'neither'}"
        )
    if isinstance(wanted, ReasoningTemplates):
        return wanted.fill(data, config.seed)
    if wanted is not None:
        return Reasonings.read(wanted, data, "reasonings")
    assert given is not None
    return Reasonings.of(data, given.examples, given.texts, given.items)


def written_rows(builder: PromptBuilder, reasonings: Reasonings, max_tokens: int) -> Ragged:
    """Token ids of each text and the marker, [n] rows. A control token in a text is broken up.

    Raises ValueError, saying how many, for texts that hold the marker or are too long.
    """
    marker = builder.config.emb_token
    texts = [builder.harmless(text) for text in reasonings.texts]
    if holding := [text for text in texts if marker in text]:
        raise ValueError(
            f"reasonings: {len(holding):,} of {len(texts):,} hold the marker {marker!r}, which "
            f"ends a reasoning and is added to it, such as {holding[0]!r}"
        )
    rows = Ragged.of(builder.tokenizer(texts, add_special_tokens=False).input_ids)
    rows = rows.append(builder.marker_ids)
    if long := int((rows.lengths > max_tokens).sum()):
        longest = int(rows.lengths.argmax())
        raise ValueError(
            f"reasonings: {long:,} of {len(texts):,} have more than max_completion_length "
            f"({max_tokens}) tokens with the marker; the longest has {rows.lengths[longest]}: "
            f"{texts[longest]!r}"
        )
    return rows


def pack_written(
    prompts: Ragged, written: Ragged, max_tokens: int
) -> Iterator[tuple[PackedBatch, np.ndarray]]:
    """Packed batches of prompts with what is written after each, and the records int64 [R] that
    their read-outs belong to. Targets are -100 in the prompts.

    What all prompts begin with is laid out once a batch: the rest are completions of it.
    """
    shared = common_prefix(prompts)
    if not shared:
        for batch in pack_histories(
            prompts, written, num_generations=1, max_tokens=max_tokens, oversize="alone"
        ):
            yield batch, batch.groups.numpy()
        return
    tails = prompts.tail(shared)
    rows = tails.join(written)
    targets = Ragged(np.full_like(tails.values, IGNORED), tails.offsets).join(written)
    for part in rows.parts(max(max_tokens - shared, 1)):
        (batch,) = pack_histories(
            [prompts[0][:shared]],
            rows[part],
            num_generations=part.stop - part.start,
            max_tokens=max_tokens,
            completion_targets=targets[part].values,
            oversize="alone",
        )
        yield batch, np.arange(part.start, part.stop)


class SupervisedUpdate(PolicyUpdate):
    """Gradients of one optimiser step, also for given reasonings."""

    def reasoning_sft(
        self,
        users: Sequence[UserBatch],
        written: Sequence[Ragged],
        item_rows: ItemRows,
        marker: list[int],
    ) -> dict:
        """Accumulate the gradient of one optimiser step; returns its statistics.

        ``users``: one an accumulation step, whose targets are the items to read out; ``written``:
        for each the tokens of reasoning and marker, a row a user; ``item_rows``: the tokens of the
        step's candidates, unused where no item is read out; ``marker``: its token ids, for direct
        mode. Where memory runs out it acts as :meth:`recpo` does.
        """
        return self._within_memory(
            lambda: self._reasoning_sft(users, written, item_rows, marker),
            lambda: self.model.zero_grad(set_to_none=True),
        )

    def _reasoning_sft(
        self,
        users: Sequence[UserBatch],
        written: Sequence[Ragged],
        item_rows: ItemRows,
        marker: list[int],
    ) -> dict:
        config = self.config
        candidates = self._candidates(item_rows) if config.trains_items else None
        read_out = candidates if config.item_weight else None
        prompts = Ragged.stack([batch.prompts for batch in users])
        texts = Ragged.stack(written)
        items = np.concatenate([batch.targets for batch in users])
        counts = distributed.sum_(
            torch.tensor([len(texts.values), len(texts)], device=self.model.device)
        )
        stats = UpdateStats()
        batches = list(pack_written(prompts, texts, self.budget.tokens))
        idle = self._idle_passes(len(batches))
        with together("micro-batches", linked=self.sharded) as section:
            for batch, records in batches:
                tokens = batch.input_ids.numel()
                section.smallest = (
                    SMALLER_RECORD.format(tokens=tokens) if len(records) == 1 else None
                )
                self._written_part(batch, items[records], read_out, counts, stats)
            for _ in range(idle):
                self._idle_pass(reference=False)
        if candidates is not None:
            if config.direct_weight:
                self._direct_term(users, candidates, marker, counts[1], stats)
            candidates.backward()
        return stats.totals() | {"counted_tokens": float(counts[0])}

    def _written_part(
        self,
        batch: PackedBatch,
        items: np.ndarray,
        candidates: Candidates | None,
        counts: torch.Tensor,
        stats: UpdateStats,
    ) -> None:
        """Add the gradient of one packed batch; ``counts``: tokens and records of the step."""
        hidden = self.model(batch)
        loss = self._token_loss(hidden, batch, counts[0], stats)
        stats.add("loss", loss)
        if candidates is not None:
            states = hidden.index_select(0, batch.readout.to(hidden.device))
            out = self._item_loss(states, candidates, items, counts[1])
            loss = loss + self.config.item_weight * out.loss
            # its value is that of a ratio of 1; the cross-entropy has the same gradient
            item_loss = -out.item_log_prob.sum() / counts[1]
            stats.add("item_loss", item_loss)
            stats.add("loss", self.config.item_weight * item_loss)
            probability = out.item_log_prob.exp().mean()
            stats.add("in_batch_probability", probability, float(len(items)))
        loss.backward()

    def _direct_term(
        self,
        users: Sequence[UserBatch],
        candidates: Candidates,
        marker: list[int],
        total: torch.Tensor,
        stats: UpdateStats,
    ) -> None:
        """Add the gradient of the items' cross-entropy without a reasoning."""
        weight = self.config.direct_weight

        def record(log_prob: torch.Tensor) -> None:
            direct_loss = -log_prob.sum() / total
            stats.add("direct_loss", direct_loss)
            stats.add("loss", weight * direct_loss)

        self._direct(users, marker, candidates, total, record, weight)

    def _token_loss(
        self, hidden: torch.Tensor, batch: PackedBatch, total: torch.Tensor, stats: UpdateStats
    ) -> torch.Tensor:
        model, written = self.model, batch.targets != IGNORED
        targets = batch.targets[written].to(hidden.device)
        states = hidden.index_select(0, batch.predict_from[written].to(hidden.device))
        out = linear_logprob(
            states,
            model.lm_head_weight,
            targets,
            bias=model.lm_head_bias,
            softcap=model.softcap,
            temperature=1 / model.logit_scale,
            entropy=self.config.log_entropy,
            impl=self.config.impl,
        )
        tokens, right = float(len(targets)), self._likeliest(states) == targets
        stats.add("mean_token_accuracy", right.double().mean(), tokens)
        if out.entropy is not None:
            stats.add("entropy", out.entropy.mean(), tokens)
        loss = -out.log_prob.sum() / total
        stats.add("token_loss", loss)
        return loss

    @torch.no_grad()
    def _likeliest(self, states: torch.Tensor) -> torch.Tensor:
        """The likeliest token after each state, int64 [T]: soft-cap and scale keep the order."""
        head, bias = self.model.lm_head_weight, self.model.lm_head_bias
        blocks = states.to(head.dtype).split(ROWS_PER_BLOCK)
        return torch.cat([torch.nn.functional.linear(b, head, bias).argmax(-1) for b in blocks])

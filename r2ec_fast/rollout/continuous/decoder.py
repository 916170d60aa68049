"""Greedy reasonings of rows that join and leave between any two steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from r2ec_fast.model.hf_compat import attention_implementation, cache_argument, eval_mode
from r2ec_fast.model.prefix_cache import KnownPrefix
from r2ec_fast.packing.packer import pack_histories
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.rollout.continuous import attention
from r2ec_fast.rollout.continuous.cache import Prefill, RowCache
from r2ec_fast.rollout.marker import MarkerStop
from r2ec_fast.rollout.onednn_linear import MIN_STEPS, PackedLinears
from r2ec_fast.rollout.shared_prompt.decoder import SharedPromptDecoder

if TYPE_CHECKING:
    from r2ec_fast.model.r2ec import R2ecModel

Owner = TypeVar("Owner")


@dataclass
class Row(Generic[Owner]):
    """A reasoning that is being written.

    Attributes:
        owner: who asked for it.
        limit: most tokens of the reasoning.
        tokens: the reasoning so far, without what was appended to it.
        finish_reason: "answer" (the marker was written), "eos", "length"; None while it goes on.
        unread: what it has yet to read before its state is known.
        state: [d], at its end; None before.
    """

    owner: Owner
    limit: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    unread: list[int] = field(default_factory=list)
    state: Tensor | None = None


class ContinuousDecoder(Generic[Owner]):
    """Writes reasonings of many rows, a token a step, with the model's arg-max.

    What a row says does not depend on the rows beside it, up to the rounding of the model's own
    products.

    Args:
        model: an architecture that `SharedPromptDecoder` runs, with weights that stay.
        marker_ids: what ends a reasoning that does not end itself.
        eos_token_ids: tokens that end a text.
        prefix: what all prompts begin with; others are refused.
    """

    def __init__(
        self,
        model: R2ecModel,
        marker_ids: Sequence[int],
        eos_token_ids: frozenset[int],
        prefix: KnownPrefix | None = None,
    ) -> None:
        if reason := SharedPromptDecoder.refuses(model.backbone):
            raise ValueError(f"model: cannot decode continuously: {reason}")
        attention.register()
        self.model, self.prefix = model, prefix
        self.marker_ids, self.eos_token_ids = list(marker_ids), eos_token_ids
        self.stop = MarkerStop(model.tokenizer, model.prompts.emb_token)
        self.rows: list[Row[Owner]] = []
        self._cache = RowCache(prefix)
        self._next: list[int] = []  # each row's newest token, which it has not read
        self._packed = PackedLinears(model.language_model)

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def join(self, prompts: Ragged, owners: Sequence[Owner], limits: Sequence[int]) -> None:
        """Read prompts, one pass for all, and begin their reasonings.

        Args:
            prompts: n rows of token ids.
            owners: n, kept with the rows.
            limits: n, most tokens of each reasoning, at least 1.
        """
        known = 0 if self.prefix is None else len(self.prefix)
        if self.prefix is not None and not self.prefix.begins(prompts):
            raise ValueError("prompts: expected ones that begin with the known prefix")
        prefill = Prefill(self.prefix)
        if known:
            tails = prompts.tail(known)
            (batch,) = pack_histories(
                [prompts[0][:known]],
                tails,
                num_generations=len(prompts),
                max_tokens=known + int(tails.lengths.sum()),
                oversize="alone",
            )
        else:
            (batch,) = pack_histories(prompts, max_tokens=int(prompts.lengths.sum()))
        # where each row's tokens lie: sequences of the batch are not in the order of the prompts
        bounds = (batch.cu_seq_lens_q - known).clamp(min=0).tolist()
        first = len(bounds) - 1 - len(prompts)  # 1 where the prefix is a sequence of its own
        starts, stops = bounds[first:-1], bounds[first + 1 :]
        order = range(len(prompts)) if known else batch.groups.tolist()
        with eval_mode(self.model):
            hidden = self.model(batch, prefill)
        room = max(int(n) + limit for n, limit in zip(prompts.lengths, limits, strict=True))
        self._cache.join(prefill, starts, stops, room + 1 + len(self.marker_ids) - known)
        new = [Row(owners[i], limits[i]) for i in order]
        ends = torch.tensor(stops, device=hidden.device) - 1
        tokens = self._arg_max(hidden[ends])
        self.rows += new
        self._next += [0] * len(new)
        self._take(range(len(self.rows) - len(new), len(self.rows)), tokens)

    @torch.no_grad()
    def step(self) -> list[Row[Owner]]:
        """A token for every row; returns the rows that are finished, which have left."""
        if not self.rows:
            return []
        tokens = torch.tensor(self._next, device=self.model.device)[:, None]
        positions = self._cache.advance().to(self.model.device)
        decoder = self.model._decoder
        with (
            eval_mode(self.model),
            attention_implementation(self.model.language_model, attention.NAME),
            self._fast_products(),
        ):
            out: Any = decoder(
                input_ids=tokens,
                position_ids=positions,
                row_cache=self._cache,
                use_cache=True,
                **{cache_argument(type(decoder)): self._cache},
            )
            states = out.last_hidden_state[:, -1]
            writing = [i for i, row in enumerate(self.rows) if row.finish_reason is None]
            written = self._arg_max(states[writing]) if writing else []
        for i, row in enumerate(self.rows):
            if row.finish_reason is not None:
                if row.unread:
                    self._next[i] = row.unread.pop(0)
                else:
                    row.state = states[i].clone()
        self._take(writing, written)
        return self._leaving([i for i, row in enumerate(self.rows) if row.state is not None])

    def drop(self, rows: Sequence[Row[Owner]]) -> None:
        """Take out rows that nobody waits for any more."""
        gone = {id(row) for row in rows}
        self._leaving([i for i, row in enumerate(self.rows) if id(row) in gone])

    def _take(self, places: Sequence[int], tokens: Sequence[int]) -> None:
        """The next token of rows that are writing."""
        for place, token in zip(places, tokens, strict=True):
            row = self.rows[place]
            if token in self.eos_token_ids:
                row.finish_reason, row.unread = "eos", list(self.marker_ids)
            else:
                row.tokens.append(token)
                if self.stop.closes(row.tokens):
                    row.finish_reason, row.unread = "answer", [token]
                elif len(row.tokens) >= row.limit:
                    row.finish_reason, row.unread = "length", [token, *self.marker_ids]
            self._next[place] = row.unread.pop(0) if row.finish_reason else token

    def _leaving(self, places: Sequence[int]) -> list[Row[Owner]]:
        found = [self.rows[place] for place in places]
        for place in sorted(places, reverse=True):
            self._cache.leave(place)
            self.rows[place], self._next[place] = self.rows[-1], self._next[-1]
            self.rows.pop(), self._next.pop()
        return found

    def _arg_max(self, states: Tensor) -> list[int]:
        # a soft-cap and a scale of the logits do not change which is the largest
        head = self.model.language_model.get_output_embeddings()
        return head(states).argmax(-1).tolist()

    def _fast_products(self) -> AbstractContextManager[object]:
        on_cpu = self.model.device.type == "cpu"
        return self._packed.installed(MIN_STEPS) if on_cpu else nullcontext()

"""Continuous decoding against the engine that writes all reasonings of a call together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _support.toy import toy_dataset, toy_model

from r2ec_fast.eval.ranking import transformers_engine, user_states
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.rollout.continuous.decoder import ContinuousDecoder

KINDS = ["llama", "qwen3", "gemma2", "gemma3"]


def setting(kind: str, with_prefix: bool):
    model = toy_model(kind).eval()
    dataset = toy_dataset()
    builder = model.prompt_builder(dataset.data.catalog)
    prompts = PromptAssembler(builder).example_rows(dataset, dataset.test)
    prefix = model.known_prefix(builder) if with_prefix else None
    engine = transformers_engine(model, builder)
    decoder = ContinuousDecoder(model, builder.marker_ids, engine.eos_token_ids, prefix)
    return model, builder, prompts, engine, decoder


def expected(model, builder, prompts, engine, limits):
    """Tokens without an appended marker, and states, of each prompt by the engine."""
    out = []
    for i, limit in enumerate(limits):
        one = user_states(
            model, builder, prompts[i : i + 1], engine=engine, max_completion_length=limit
        )
        tokens = one.reasoning[0].tolist()
        if one.finish_reason[0] != "answer":
            tokens = tokens[: -len(builder.marker_ids)]
        out.append((tokens, one.finish_reason[0], one.states[0]))
    return out


def check(rows, wanted):
    assert sorted(row.owner for row in rows) == list(range(len(wanted)))
    for row in rows:
        tokens, reason, state = wanted[row.owner]
        assert (row.tokens, row.finish_reason) == (tokens, reason)
        torch.testing.assert_close(row.state, state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_prefix", [False, True])
def test_rows_that_join_and_leave_at_any_time(kind, with_prefix):
    model, builder, prompts, engine, decoder = setting(kind, with_prefix)
    rng = np.random.default_rng(3)
    limits = rng.integers(1, 14, len(prompts)).tolist()
    wanted = expected(model, builder, prompts, engine, limits)
    assert len({reason for _, reason, _ in wanted}) >= 1
    waiting, finished = list(range(len(prompts))), []
    while waiting or len(decoder):
        count = min(len(waiting), int(rng.integers(0, 4)))
        if count:
            some, waiting = waiting[:count], waiting[count:]
            decoder.join(prompts.select(some), some, [limits[i] for i in some])
        finished += decoder.step()
    check(finished, wanted)


def test_rows_that_end_themselves(monkeypatch):
    """By the marker and by the end of text, beside rows that are cut."""
    model, builder, _, engine, decoder = setting("llama", False)
    rng = np.random.default_rng(0)
    vocabulary = len(model.tokenizer)
    prompts = Ragged.of([rng.integers(3, vocabulary, n) for n in rng.integers(1, 12, 24)])
    free = expected(model, builder, prompts, engine, [12] * len(prompts))
    # what rows write becomes the end of text, and of a reasoning
    changing = [tokens for tokens, *_ in free if len(set(tokens)) > 1]
    eos, closing = changing[0][-1], changing[1][-1]
    assert eos != closing
    engine.eos_token_ids = decoder.eos_token_ids = frozenset({eos})
    closes = type(decoder.stop).closes

    def planted(self, ids):
        return ids[-1] == closing or closes(self, ids)

    monkeypatch.setattr(type(decoder.stop), "closes", planted)
    wanted = expected(model, builder, prompts, engine, [12] * len(prompts))
    assert {"eos", "answer"} <= {reason for _, reason, _ in wanted}
    decoder.join(prompts, range(len(prompts)), [12] * len(prompts))
    finished = []
    while len(decoder):
        finished += decoder.step()
    check(finished, wanted)


def test_dropped_rows_do_not_disturb_the_others():
    model, builder, prompts, engine, decoder = setting("llama", True)
    wanted = expected(model, builder, prompts, engine, [9] * len(prompts))
    decoder.join(prompts, range(len(prompts)), [9] * len(prompts))
    decoder.step()
    gone = [row for row in decoder.rows if row.owner % 3 == 0]
    decoder.drop(gone)
    finished = []
    while len(decoder):
        finished += decoder.step()
    assert sorted(row.owner for row in finished) == [i for i in range(len(prompts)) if i % 3]
    for row in finished:
        assert row.tokens == wanted[row.owner][0]


def test_other_prompts_than_those_of_the_prefix_are_refused():
    *_, decoder = setting("llama", True)
    with pytest.raises(ValueError, match="begin with the known prefix"):
        decoder.join(Ragged.of([[1, 2, 3]]), [0], [4])

"""Packed attention against one sequence at a time, on every path that runs here."""

import pytest
import torch

from r2ec_fast.model.attention import VarlenLayout, _flex, _sdpa
from r2ec_fast.packing.packer import pack_histories

HEADS, KV_HEADS, DIM = 4, 2, 8


def materialised(q, k, v, window, softcap):
    """[H, Lq, D] x [H_kv, Lk, D]: the equation, with the last query at the last key."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
    scores = q @ k.mT * DIM**-0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    lq, lk = scores.shape[1:]
    for i in range(lq):
        at = lk - lq + i
        for j in range(lk):
            if j > at or (window is not None and at - j >= window):
                scores[:, i, j] = -torch.inf
    return scores.softmax(-1) @ v


@pytest.fixture
def packed():
    torch.manual_seed(0)
    prompts = [[1] * 5, [2] * 3]
    completions = [[3] * 2, [4] * 4, [5] * 1, [6] * 6]
    (batch,) = pack_histories(prompts, completions, num_generations=2, max_tokens=64)
    tokens = batch.input_ids.shape[1]
    q, k, v = (
        torch.randn(1, heads, tokens, DIM, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return batch, q, k, v


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("path", [_sdpa, _flex])
def test_each_sequence_sees_its_prompt_and_its_past(packed, path, window, softcap):
    batch, query, key, value = packed
    layout = VarlenLayout.from_batch(batch)
    out = path(query, key, value, layout, DIM**-0.5, 0.0, window, softcap)[0]  # [T, H, D]
    q_bounds, k_bounds = batch.cu_seq_lens_q.tolist(), batch.cu_seq_lens_k.tolist()
    assert len(q_bounds) == 7  # two prompts, four completions
    for s in range(len(q_bounds) - 1):
        mine = slice(q_bounds[s], q_bounds[s + 1])
        rows = batch.kv_index[k_bounds[s] : k_bounds[s + 1]]
        expected = materialised(
            query[0, :, mine], key[0][:, rows], value[0][:, rows], window, softcap
        )
        torch.testing.assert_close(out[mine].transpose(0, 1), expected)


def test_layout_refuses_keys_that_are_not_whole_sequences(packed):
    batch = packed[0]
    batch.kv_index = batch.kv_index.roll(1)
    with pytest.raises(ValueError, match="kv_index"):
        VarlenLayout.from_batch(batch)

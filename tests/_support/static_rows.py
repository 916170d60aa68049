"""Rows of the rollout decoders, to be compared."""

import numpy as np
import torch

from r2ec_fast.rollout import TransformersEngine

MARKER = "b>"
ARGUMENTS = {
    "user_keys": range(4),
    "num_generations": 3,
    "max_completion_length": 11,
    "temperature": 1.3,
    "seed": 2,
    "step": 4,
    "states": True,
}
DRAWS = {"whole": {}, "top_k": {"top_k": 9}, "greedy": {"greedy": True}}


def rows_of(decoder, model, tokenizer, prompts, **changes):
    engine = TransformersEngine(model, tokenizer, MARKER, decoder=decoder)
    return engine.generate(prompts, **ARGUMENTS | changes)


def assert_equal_rows(got, right, tolerance=1e-6):
    for name in ("values", "offsets", "sampled"):
        np.testing.assert_array_equal(getattr(got, name), getattr(right, name))
    assert got.finish_reason == right.finish_reason
    np.testing.assert_allclose(got.log_prob, right.log_prob, rtol=1e-6, atol=tolerance)
    assert (got.states is None) == (right.states is None)
    if right.states is not None:
        torch.testing.assert_close(got.states, right.states, rtol=1e-5, atol=2e-5)

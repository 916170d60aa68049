"""A prompt's state does not depend, by a bit, on the prompts that are computed beside it (CPUs)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from _support.processes import environment

CODE = """
import json, sys
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from _support.tiny_tokenizer import tiny_tokenizer
from r2ec_fast.model.prefix_cache import KnownPrefix
from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.model.hf_compat import eval_mode
from r2ec_fast.packing.packer import pack_histories
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.serve.numerics import invariant

torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
tokenizer = tiny_tokenizer()
config = LlamaConfig(vocab_size=max(len(tokenizer), 512), hidden_size=576, intermediate_size=1536,
                     num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3)
model = R2ecModel(LlamaForCausalLM(config).eval(), tokenizer)
rng = np.random.default_rng(0)
head = rng.integers(5, 400, 40)
rows = Ragged.of([np.concatenate([head, rng.integers(5, 400, n)])
                  for n in [1, 2, 3, 5, *rng.integers(3, 120, 20)]])
prefix = KnownPrefix(head.tolist())
(batch,) = pack_histories([prefix.tokens], max_tokens=40)
with torch.no_grad(), eval_mode(model):
    model(batch, prefix)
prefix.complete = True
print(json.dumps(invariant(model, rows, prefix)))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_states_are_the_same_in_any_company(threads):
    from r2ec_fast.serve.numerics import strict_products

    own = environment() | strict_products()
    if not strict_products():
        pytest.skip("a CPU without AVX2: servers compute a prompt a pass here")
    own.pop("OMP_NUM_THREADS", None)
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(threads)], env=own, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) is True

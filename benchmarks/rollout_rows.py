"""Rollouts: G samples of one prompt beside ``generate(num_return_sequences=G)``.

The language model and transformers come in where a row is built.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from harness import Case, Entry, Wrong, require
from options import Options


def entries(options: Options) -> Iterator[Entry]:
    """P tokens of a prompt, R new ones of each of G samples; a second is of new tokens."""
    prompt, new = (40, 8) if options.tiny else (600, 32)
    for samples in (8, 64) if options.device == "cuda" else (2, 4, 8):
        shape = {"P": prompt, "R": new, "G": samples}
        methods = (*_decoders(options), "generate")
        build = functools.partial(_rollout_cases, options, prompt, new, samples)
        op = f"samples, {options.label}"
        yield Entry("rollout", op, shape, methods, build, "generate", "decode")


def _decoders(options: Options) -> tuple[str, ...]:
    # static slots are for graphs, which a CPU has none of; a toy size shows that they work
    on_graphs = options.device == "cuda" or options.tiny
    return ("static", "shared", "plain") if on_graphs else ("shared", "plain")


def _rollout_cases(options: Options, prompt: int, new: int, samples: int) -> list[Case]:
    import rollout

    model, tokenizer = _language_model(options)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 500, (prompt,), generator=generator).tolist()
    limit = 5e-2 if options.model_dtype == torch.bfloat16 else 1e-3

    @torch.no_grad()
    def check(out) -> float:
        return require(rollout.log_prob_error(model, ids, out), limit, "log-probability")

    made = [
        Case(
            name,
            rollout.engine_run(model, tokenizer, ids, samples, new, name),
            check,
            work=float(samples * new),
            unit="tokens",
        )
        for name in _decoders(options)
    ]
    run = rollout.generate_run(model, ids, samples, new)
    length = prompt + new

    def whole(out: torch.Tensor) -> None:
        if out.shape != (samples, length):
            raise Wrong(f"expected {samples} rows of {length} tokens, got {list(out.shape)}")

    return [*made, Case("generate", run, whole, work=float(samples * new), unit="tokens")]


@functools.lru_cache(maxsize=1)
def _language_model(options: Options):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from workload import random_model, small_tokenizer

    dtype = options.model_dtype
    if options.model is None:
        texts = ["Analyze in depth and recommend the next product."]
        model = random_model(options.size, dtype, device=options.device)
        return model.eval(), small_tokenizer(texts)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    return model.to(options.device).eval(), AutoTokenizer.from_pretrained(options.model)

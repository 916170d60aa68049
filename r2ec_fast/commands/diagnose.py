"""`r2ec-fast diagnose`; its docstring is the help of its settings."""

from __future__ import annotations

import json

from r2ec_fast.utils.atomic_files import check_writable, write_whole
from r2ec_fast.utils.terminal import say


def diagnose(
    model: str,
    data: str,
    *,
    split: str = "valid",
    samples: int = 256,
    num_generations: int = 4,
    temperature: float = 1.5,
    top_k: int = 200,
    max_completion_length: int = 512,
    exclude_window: bool = False,
    max_tokens: int = 16384,
    batch_size: int = 64,
    seed: int = 42,
    dtype: str = "auto",
    gguf_file: str | None = None,
    output_file: str | None = None,
) -> dict[str, float]:
    """Print whether a model's reasoning pays, and whether RecPO has anything to choose from.

    Args:
        model: directory that a training run exported, or any causal language model (untrained: its
            item table is then encoded first).
        data: prepared data set (directory).
        split: train, valid or test.
        samples: examples, a seeded sample; 0 = all. Each costs num_generations + 1 reasonings.
        num_generations: sampled reasonings an example, as in training.
        temperature: of the sampling, as in training.
        top_k: sample among the k likeliest tokens, as in training; 0 = all.
        max_completion_length: longest reasoning (tokens).
        exclude_window: exclude only the events shown in the prompt, not all earlier ones.
        max_tokens: token budget of a forward pass.
        batch_size: users computed together.
        seed: of the sample, the sampling, and whose reasoning is swapped with whose.
        dtype: "auto", "float32", "bfloat16" or "float16".
        gguf_file: read the weights from this GGUF file of the model's directory.
        output_file: also write the figures as JSON.
    """
    from r2ec_fast.config import RecPOConfig
    from r2ec_fast.data import RecDataset
    from r2ec_fast.data.splits import sample_examples
    from r2ec_fast.eval.ranking import transformers_engine
    from r2ec_fast.eval.readiness import advice, concerns, readiness_table
    from r2ec_fast.eval.reasoning import ReasoningProbe
    from r2ec_fast.model.loading import give_items, load_model
    from r2ec_fast.prompts.segments import PromptAssembler

    config = RecPOConfig(
        num_generations=num_generations,
        temperature=temperature,
        top_k=top_k,
        max_completion_length=max_completion_length,
        seed=seed,
    )
    check_writable(output_file, "output_file")
    dataset = RecDataset.load(data)
    examples = sample_examples(dataset, split, samples, seed)
    if len(examples) == 0:
        raise ValueError(f"split: {split} of {data} holds no example")
    r2ec = load_model(model, dtype=dtype, gguf_file=gguf_file)
    give_items(r2ec, dataset.data.catalog, max_tokens)
    builder = r2ec.prompt_builder(dataset.data.catalog)
    probe = ReasoningProbe(
        r2ec,
        PromptAssembler(builder),
        dataset,
        transformers_engine(r2ec, builder),
        config,
        max_tokens=max_tokens,
        exclude_window=exclude_window,
        batch_size=batch_size,
    )
    figures = probe.figures(examples)
    say(readiness_table(figures))
    if output_file is not None:
        write_whole(output_file, json.dumps(figures, indent=2) + "\n", "output_file")
    if found := concerns(figures):
        say("\n" + advice(found))
    return figures

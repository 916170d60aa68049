"""Toy language models of every architecture, small enough for float64."""

from __future__ import annotations

import torch
import transformers

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
WINDOW = {"sliding_window": 7}
KINDS = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (
        transformers.Qwen2Config,
        WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {}),
    "mistral": (transformers.MistralConfig, WINDOW),
    "gemma2": (
        transformers.Gemma2Config,
        WINDOW
        | {
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (transformers.Gemma3TextConfig, WINDOW | {"query_pre_attn_scalar": 8}),
}


def toy_config(kind: str, **settings: object) -> transformers.PretrainedConfig:
    """A configuration of one architecture; ``settings`` replace those above."""
    config, own = KINDS[kind]
    settings = SIZES | own | settings
    if kind == "gemma3" and "layer_types" not in settings:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        settings["layer_types"] = kinds[: settings["num_hidden_layers"]]
    return config(**settings)


def toy_backbone(
    kind: str,
    *,
    dtype: torch.dtype,
    seed: int,
    scale: float,
    embeddings: bool = False,
    **settings: object,
) -> transformers.PreTrainedModel:
    """A random model; ``scale`` spreads its weights, those of the embeddings too if asked for, so
    that its samples and states differ."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(toy_config(kind, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and (embeddings or "embed" not in name):
                parameter.mul_(scale)
    return model.to(dtype)

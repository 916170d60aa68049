"""Prompts and models of the rollout tests: a small vocabulary, so that a marker is often hit."""

import torch

PIECES = [*"abcdefgh", "<", ">", "<a", "b>", ">c", "ans", "Ġ", "Ġd"]
EOS = 0
VOCAB = 1 + len(PIECES)
SIZES = {  # replace those of backbones.SIZES
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": EOS,
    "attention_dropout": 0.3,
}


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random tokens, none of them EOS."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]

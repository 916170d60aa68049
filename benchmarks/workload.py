"""The work of the end-to-end suite: a model, a catalog of titles, users, and an item table.

A folder of a causal language model is used where one is given; otherwise a random model of a
published size with a small tokenizer made from the titles. Times do not depend on what the weights
are, and rows of a random model say so. Titles and users are generated from a seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from r2ec_fast.model.r2ec import R2ecModel
from r2ec_fast.prompts.builder import PromptBuilder, PromptConfig

MAX_TITLE = 24  # tokens
WINDOW = 64  # events shown at most: the prompt's length is set by the number of events
NOW = 1_700_000_000  # unix seconds
SAMPLE = 48  # items that are encoded to learn how item states are spread

_LLAMA = {"num_key_value_heads": 3, "num_attention_heads": 9, "tie_word_embeddings": True}
SIZES: dict[str, tuple[str, dict[str, object]]] = {
    "toy": ("LlamaConfig", {
        "vocab_size": 600, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }),
    "SmolLM2-135M": ("LlamaConfig", _LLAMA | {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "max_position_embeddings": 8192, "rope_theta": 100_000.0,
    }),
    "Qwen2.5-1.5B": ("Qwen2Config", {
        "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "max_position_embeddings": 32_768,
    }),
    "Gemma-2-2B": ("Gemma2Config", {
        "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "sliding_window": 4096, "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    }),
}  # fmt: skip

BRANDS = "Alder Boreal Cinder Dunmore Everly Fjord Granite Harrow Ironwood Juniper Kestrel Lumen"
STYLES = "Folding Classic Compact Heavy Vintage Portable Adjustable Wireless Deluxe Slim Solid Duo"
THINGS = (
    "Tent Lantern Kettle Teapot Helmet Saddle Easel Palette Planter Bench Desk Lamp Guitar Drum"
)
PARTS = "Padded Handle;Steel Frame;Carry Bag;Spare Battery;Wall Mount;Soft Case;Oak Legs;LED Light"
COLORS = "Amber Black Crimson Ivory Jade Navy Silver Teal"


class Fields:
    """No columns beside the titles."""

    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Catalog:
    """Titles and external ids; what prompts need of `r2ec_fast.data.Catalog`, without polars."""

    titles: list[str]
    ids: list[str]
    fields: type[Fields] = Fields

    def __len__(self) -> int:
        return len(self.titles)


class Events(NamedTuple):
    """A user's events; what prompts need of `r2ec_fast.data.History`, without polars."""

    items: np.ndarray
    timestamps: np.ndarray
    ratings: np.ndarray
    target_time: int


@dataclass
class Workload:
    """Everything the stages of a recommendation start from.

    ``titles``: the token ids of every title, at most `MAX_TITLE`, without an end token.
    ``label``: which weights; ``folder``: where they were read from, None for random ones.
    """

    model: R2ecModel
    builder: PromptBuilder
    catalog: Catalog
    titles: list[list[int]]
    users: list[Events]
    label: str
    folder: str | None
    eos: int

    @property
    def device(self) -> str:
        return self.model.device.type

    def describe(self) -> str:
        prompts = [len(self.builder.user_ids(user)) for user in self.users]
        lengths = [len(title) for title in self.titles]
        return (
            f"{self.label}, {next(self.model.parameters()).dtype}".replace("torch.", "")
            + f" | prompts of {np.mean(prompts):.0f} tokens ({min(prompts)}-{max(prompts)})"
            f" | {len(self.catalog):,} items, titles of {np.mean(lengths):.1f} tokens"
            f" ({min(lengths)}-{max(lengths)}) | item table drawn around {SAMPLE} encoded items"
        )


def make_workload(
    model: str | None,
    size: str,
    *,
    device: str,
    dtype: torch.dtype,
    items: int,
    users: int,
    prompt_tokens: int,
    titles: Path | None = None,
) -> Workload:
    """Load or make the model, the catalog and ``users`` users with prompts of about
    ``prompt_tokens`` tokens, and fill the item table."""
    texts = titles.read_text(encoding="utf-8").splitlines() if titles else generate_titles(items)
    texts = list(dict.fromkeys(" ".join(text.split()) for text in texts if text.strip()))
    if model is None:
        backbone, tokenizer = random_model(size, dtype, device=device), small_tokenizer(texts)
        label = f"{size} shape, random weights"
    else:
        backbone, tokenizer = _load(model, dtype)
        label = Path(model).name
    texts, rows = _short_titles(tokenizer, texts, items)
    recommender = R2ecModel(
        backbone.to(device).eval(), tokenizer, prompts=PromptConfig(window=WINDOW)
    )
    catalog = Catalog(texts, [f"item-{i}" for i in range(len(texts))])
    builder = PromptBuilder(tokenizer, catalog, recommender.prompts)
    eos = tokenizer.eos_token_id
    histories = [make_user(builder, len(texts), prompt_tokens, seed) for seed in range(users)]
    work = Workload(recommender, builder, catalog, rows, histories, label, model, eos)
    recommender.set_items(draw_items(work))
    return work


def generate_titles(count: int) -> list[str]:
    """About ``count`` * 2 distinct shop titles, in a random order."""
    rng = np.random.default_rng(0)
    words = [text.split() for text in (BRANDS, STYLES, THINGS, COLORS)]
    parts = PARTS.split(";")
    found: dict[str, None] = {}
    for turn in itertools.count():
        if len(found) >= 2 * count:
            return list(found)
        brand, style, thing, color = (rng.choice(group) for group in words)
        first, second = rng.choice(parts, 2, replace=False)
        size = int(rng.integers(2, 40))
        found[
            (
                f"{brand} {style} {thing} with {first}, {color}",
                f"{brand} {style} {thing} with {first} and {second}, {color}, {size} Inch",
                f"{brand} {thing} {size}, {color} {style}",
            )[turn % 3]
        ] = None
    raise AssertionError("unreachable")


def random_model(size: str, dtype: torch.dtype, seed: int = 0, device: str = "cpu"):
    """A causal language model of a published size with random weights, drawn on ``device``."""
    import transformers

    name, settings = SIZES[size]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**settings)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def small_tokenizer(texts: Sequence[str]):
    """A byte-level BPE of at most 400 tokens, learned from titles and the prompts' words: titles of
    about as many tokens as a real tokenizer gives."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from r2ec_fast.prompts.builder import ITEM_TEMPLATE, USER_TEMPLATE

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts[:2000], USER_TEMPLATE, ITEM_TEMPLATE], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )


def make_user(builder: PromptBuilder, items: int, prompt_tokens: int, seed: int) -> Events:
    """Random events, as many as bring the prompt closest to ``prompt_tokens`` from below."""
    rng = np.random.default_rng(1000 + seed)
    chosen = rng.choice(items, min(WINDOW, items), replace=False).astype(np.int64)
    ages = np.sort(rng.integers(3600, 86_400 * 300, len(chosen)))[::-1]
    ratings = rng.integers(1, 6, len(chosen)).astype(np.float32)
    low, high = 1, len(chosen)

    def newest(count: int) -> Events:
        return Events(chosen[-count:], NOW - ages[-count:], ratings[-count:], NOW)

    while low < high:
        middle = (low + high + 1) // 2
        if len(builder.user_ids(newest(middle))) <= prompt_tokens:
            low = middle
        else:
            high = middle - 1
    return newest(low)


@torch.no_grad()
def draw_items(work: Workload) -> torch.Tensor:
    """An item table [N, d] with the mean and the spread of a few encoded items.

    Encoding a whole catalog takes minutes on a CPU and is done once, not at every request.
    """
    sample = range(min(SAMPLE, len(work.catalog)))
    states = work.model.encode_rows(work.builder.items_ids(sample)).float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(work.catalog), states.shape[1], generator=generator)
    return states.mean(0) + states.std(0) * noise.to(states.device)


def _load(path: str, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(path)


def _short_titles(tokenizer, texts: Sequence[str], count: int) -> tuple[list[str], list[list[int]]]:
    """The first ``count`` titles of at most `MAX_TITLE` tokens, and their tokens."""
    rows = tokenizer(list(texts), add_special_tokens=False).input_ids
    kept = [i for i, row in enumerate(rows) if 0 < len(row) <= MAX_TITLE][:count]
    if not kept:
        raise ValueError(f"titles: expected some of at most {MAX_TITLE} tokens, got none")
    return [texts[i] for i in kept], [rows[i] for i in kept]

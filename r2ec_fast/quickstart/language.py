"""The language of a generated world: a tokenizer made for it, and a small model that knows nothing.

The tokenizer is byte-level, so any text can be encoded. The phrases that all prompts and reasonings
share are one token each, which makes them cheap: an event of a prompt has 5 tokens, a step of a
chain 4.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from r2ec_fast.prompts.builder import PromptConfig
from r2ec_fast.quickstart.reasoning import COLOURED, COMES_NEXT, LEADS_TO, NEXT
from r2ec_fast.quickstart.world import COLOURS, LONGEST_GAP, PRODUCTS, World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r2ec_fast.model.r2ec import R2ecModel

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_TEMPLATE = "Recommend a {category_singular} inside {emb_token} and {emb_end_token}:"
ITEM_TEMPLATE = "Describe a {category_singular} inside {emb_token} and {emb_end_token}:"
# a model that starts from random weights learns faster with a softer item head than 0.02
TEMPERATURE = 0.05
INITIALIZER_RANGE = 0.08


def prompts(world: World) -> PromptConfig:
    """Short prompts that show as many purchases as the world's chain has steps."""
    return PromptConfig(
        window=world.steps,
        max_user_tokens=256,
        max_item_tokens=64,
        item_fields=(),
        user_template=USER_TEMPLATE,
        item_template=ITEM_TEMPLATE,
    )


def new_model(world: World, *, layers: int = 2, hidden_size: int = 128) -> R2ecModel:
    """A Llama with random weights, drawn from torch's generator, and the tokenizer of ``world``.

    Not a Qwen2: transformers gives every Qwen2 that it loads Qwen's own way of cutting text.

    Args:
        world: whose words it can write cheaply.
        layers: of the model.
        hidden_size: of the model, a multiple of 16.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from r2ec_fast.model.r2ec import R2ecModel

    if layers < 1:
        raise ValueError(f"layers: expected at least 1, got {layers}")
    if hidden_size < 16 or hidden_size % 16:
        raise ValueError(f"hidden_size: expected a multiple of 16, got {hidden_size}")
    tokenizer = train_tokenizer(world)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        # the usual 0.02 is for wide models: one of 128 stays on a plateau with it
        initializer_range=INITIALIZER_RANGE,
    )
    backbone = LlamaForCausalLM(config)
    return R2ecModel(backbone, tokenizer, temperature=TEMPERATURE, prompts=prompts(world))


def train_tokenizer(world: World) -> PreTrainedTokenizerBase:
    """A byte-level BPE with a ChatML template, whose tokens are the words of ``world`` and the
    phrases of prompts and reasonings."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = _pieces(world)
    # the longest piece that fits; other text falls into words, digits and runs of signs or spaces
    known = "|".join(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True))
    pattern = Regex(rf"{known}|\d| ?[^\W\d]+| ?[^\w\s]+|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # merges go on until every piece is one token: a text of pieces alone has no other pairs
    trainer = trainers.BpeTrainer(
        vocab_size=2**16,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _pieces(world: World) -> list[str]:
    """Texts that become one token each."""
    config = prompts(world)
    marker = config.emb_token
    instructions = [config.instruction(t) for t in (config.user_template, config.item_template)]
    parts = [part for text in instructions for part in re.split(f"({marker})", text) if part]
    frame = ["user\n", "assistant\n", "\n", "\n\nTitle:", " 0.0h ago:", "]\n", "]"]
    ages = [f"{day}d" for day in range(1, world.steps * LONGEST_GAP + 1) if day < 10]
    chain = [f" {LEADS_TO}", NEXT, f". {NEXT}", f" {COMES_NEXT}"]
    for colour, coloured in zip(COLOURS[: world.colours], COLOURED, strict=False):
        chain += [f" [{colour.title()}", f" {colour.title()}", coloured, f". {coloured}"]
    words = [f" {product}" for product in PRODUCTS[: world.products]]
    return list(dict.fromkeys([*frame, *ages, *parts, *chain, *words]))

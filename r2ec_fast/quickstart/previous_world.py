"""What the quick start trains on: generated data, a tokenizer made for it, a small random model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r2ec_fast.prompts.builder import PromptConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r2ec_fast.data import Catalog, RecDataset
    from r2ec_fast.model.r2ec import R2ecModel

PROMPTS = PromptConfig(window=3, item_fields=(), max_user_tokens=512)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 1024
# a model that starts from random weights learns faster with a softer item head than 0.02
TEMPERATURE = 0.05


@dataclass(frozen=True)
class Sizes:
    """How much the quick start trains; the defaults take about three minutes on two cores.

    Args:
        users: generated users.
        hidden_size: of the model.
        layers: of the model.
        warmup_steps: optimiser steps of the language-model warm-up.
        contrastive_steps: optimiser steps of the contrastive objective.
        recpo_steps: optimiser steps of RecPO.
        batch: users in a step of warm-up and contrastive training.
        recpo_batch: users in a step of RecPO.
        generations: reasonings sampled for one user.
        test_examples: evaluated, a seeded sample.
    """

    users: int = 1200
    hidden_size: int = 128
    layers: int = 2
    warmup_steps: int = 160
    contrastive_steps: int = 30
    recpo_steps: int = 40
    batch: int = 48
    recpo_batch: int = 32
    generations: int = 4
    test_examples: int = 500


def generate(sizes: Sizes, seed: int) -> RecDataset:
    """Generated users and items, split by time."""
    from r2ec_fast.data import generate_interactions, make_splits

    return make_splits(generate_interactions(sizes.users, seed=seed))


def new_model(catalog: Catalog, sizes: Sizes) -> R2ecModel:
    """A Qwen2 with random weights, drawn from torch's generator."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from r2ec_fast.model.r2ec import R2ecModel

    tokenizer = train_tokenizer(catalog)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=3 * sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return R2ecModel(Qwen2ForCausalLM(config), tokenizer, temperature=TEMPERATURE, prompts=PROMPTS)


def train_tokenizer(catalog: Catalog, vocab_size: int = VOCABULARY) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on the catalog's text and the prompts' wording.

    It has a ChatML template; any text can be encoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    instructions = [PROMPTS.instruction(t) for t in (PROMPTS.user_template, PROMPTS.item_template)]
    chat = ["system user assistant\n", "d h min ago: [] ()", "Title: Description: "]
    text = [*instructions * 50, *chat * 50]
    for row in catalog.fields.iter_rows(named=True):
        text += [
            row["title"],
            f"[{row['title']}]",
            row["description"],
            reasoning_text(row, row, row),
        ]
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def reasoning_text(brand: Mapping, color: Mapping, last: Mapping) -> str:
    """A short reasoning that names the brand, colour and product of (maybe different) items."""
    return (
        f"Something by {brand['brand']} in {color['color'].lower()} that goes with the "
        f"{last['kit'].lower()} {last['product'].lower()}."
    )

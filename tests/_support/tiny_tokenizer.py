"""A byte-level tokenizer trained on a few words, with two chat templates."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# refuses a system role and writes the beginning-of-text token itself, as Gemma's does
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|bos|>",
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
CORPUS = (
    "Analyze in depth and finally recommend next product I might purchase inside <answer>.",
    "Summarize key attributes of the following product. Title: red steel kettle. User Rating: 4.5",
    "Number of Buyers: 120. Description: a small kettle for two cups, made of steel, red.",
    "3d 4.2h ago: [blue ceramic mug] (5.0)\n5h 12.0min ago: [green glass bowl] (4.0)\n7.5min ago:",
)


def tiny_tokenizer(
    template: str | None = CHAT_TEMPLATE,
    *,
    corpus: Sequence[str] = CORPUS,
    vocab_size: int = 400,
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `corpus` (any text can be encoded), with `template` as its chat
    template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        bos = ("<|bos|>", tokenizer.token_to_id("<|bos|>"))
        tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<start_of_turn>", "<end_of_turn>"],
    )
    fast.chat_template = template
    return fast

"""RecPO's reward in TRL's GRPOTrainer, on a toy language model (docs/guides/use-elsewhere.md).

    pip install "trl>=1.16" && python examples/trl_grpo.py

Each of 8 prompts names the last purchase, and each has one next purchase, its target. A frozen copy
of the model reads prompt and completion, and the reward is RecPO's: where the target ranks among 16
items by the state of "<answer>". GRPO teaches the model to write what brings the target up. (All
weights are random: the words that do so mean nothing.)
"""

import argparse
import copy
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import GRPOConfig, GRPOTrainer

from r2ec_kernels import recpo_reward, target_stats

TITLES = [
    f"{colour} {thing}"
    for colour in ("red", "blue", "green", "white")
    for thing in ("kettle", "mug", "bowl", "lamp")
]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word."""
    words = ["<pad>", "<end>", "<answer>", "After", "next", *" ".join(TITLES).split()]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def toy_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Two random layers of 32 columns."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def catalog_reward(reader, tokenizer, items):
    def recpo(prompts, completions, target, **_):
        texts = [f"{p} {c} <answer>" for p, c in zip(prompts, completions, strict=True)]
        batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            states = reader.model(**batch.to(items.device)).last_hidden_state[:, -1]
        rank, log_prob = target_stats(states, items, target, similarity="cosine", temperature=0.1)
        return recpo_reward(rank, log_prob).tolist()

    return recpo


def train(steps: int) -> tuple[list[float], float]:
    """(mean reward of each step, how far the furthest weight moved)."""
    tokenizer = toy_tokenizer()
    model = toy_model(tokenizer)
    reader = copy.deepcopy(model).eval()
    batch = tokenizer([f"{title} <answer>" for title in TITLES], return_tensors="pt")
    with torch.no_grad():
        items = reader.model(**batch).last_hidden_state[:, -1]
    prompts = [f"After {title} next" for title in TITLES[:8]]
    targets = [(5 * i + 3) % len(TITLES) for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model,
            reward_funcs=catalog_reward(reader, tokenizer, items),
            args=settings(folder, steps),
            train_dataset=Dataset.from_dict({"prompt": prompts, "target": targets}),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    pairs = zip(model.parameters(), reader.parameters(), strict=True)
    return rewards, max(float((new - old).detach().abs().max()) for new, old in pairs)


def settings(folder: str, steps: int) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    rewards, _ = train(parser.parse_args().steps)
    for step, reward in enumerate(rewards, 1):
        sys.stdout.write(f"step {step:>2}: reward {reward:.3f}\n")


if __name__ == "__main__":
    main()

"""One chain world, and how the models of `reasoning.py` are trained and measured in it.

All training goes through `RecPOTrainer`, all ranking through `rank_examples`, on the same test
examples. Costs are seconds of this process's CPU time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from changed_loss import Loss, changed_loss

from r2ec_fast import R2ecModel, RecPOConfig, RecPOTrainer
from r2ec_fast.data import Examples, RecDataset
from r2ec_fast.data.splits import sample_examples
from r2ec_fast.eval.metrics import ranking_metrics
from r2ec_fast.eval.ranking import rank_examples, states_after, transformers_engine
from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.prompts.segments import PromptAssembler
from r2ec_fast.quickstart.judging import FILE as JUDGEMENTS
from r2ec_fast.quickstart.judging import JudgedEngine, read_judgements
from r2ec_fast.quickstart.language import new_model
from r2ec_fast.quickstart.reasoning import judge_reasoning
from r2ec_fast.quickstart.warmup import WarmUp, warm_up
from r2ec_fast.quickstart.world import World
from r2ec_fast.report.plots import read_log

STEP_TOKENS, END_TOKENS = 4, 4  # of a chain: a step, and the end with the marker
CALIBRATION = (10, 30)  # steps of two short runs that tell what a step costs
BATCH = 64  # examples ranked together

Metrics = dict[str, float]
Curves = dict[str, list[float]]


@dataclass(frozen=True)
class Sizes:
    """How large the world is and how long each training; the defaults are near the quick start's.

    A step of RecPO samples ``generations`` reasonings for each of ``recpo_batch`` users.
    ``test_examples`` is a seeded sample, the same for all runs of a seed; 0: all.
    """

    products: int = 48
    colours: int = 4
    steps: int = 3
    users: int = 1500
    events: int = 9
    hidden_size: int = 128
    layers: int = 2
    warmup_steps: int = 320
    warmup_item_steps: int = 80
    warmup_batch: int = 32
    recpo_steps: int = 50
    recpo_batch: int = 24
    generations: int = 8
    recpo_learning_rate: float = 1e-3
    direct_batch: int = 48
    direct_learning_rate: float = 1e-3
    test_examples: int = 500

    def world(self, seed: int) -> World:
        return World(self.products, self.colours, self.steps, self.users, self.events, seed=seed)

    @property
    def longest(self) -> int:
        """Tokens of the longest reasoning: the right one, and two steps more."""
        return STEP_TOKENS * (self.steps + 2) + END_TOKENS


class Trained(NamedTuple):
    """A model after RecPO, the CPU seconds it took, and by step the mean reward, the mean tokens of
    a reasoning ("length") and the share of right reasonings ("right")."""

    model: R2ecModel
    seconds: float
    curves: Curves


class Lab:
    """The world of a seed with its data, and the test examples that everything is measured on."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes, self.seed, self.world = sizes, seed, sizes.world(seed)

    @cached_property
    def data(self) -> RecDataset:
        return self.world.dataset()

    @cached_property
    def test(self) -> Examples:
        return sample_examples(self.data, "test", self.sizes.test_examples, self.seed)

    @cached_property
    def assembler(self) -> PromptAssembler:
        """Of all models here: the world alone decides on words and tokens."""
        model = new_model(self.world, layers=1, hidden_size=16)
        return PromptAssembler(model.prompt_builder(self.data.data.catalog))

    @cached_property
    def prompts(self) -> Ragged:
        """Token ids of the test examples' prompts, X rows."""
        return self.assembler.example_rows(self.data, self.test)

    # ---- training -------------------------------------------------------------------------------

    def new_model(self, layers: int) -> R2ecModel:
        """One that knows nothing yet."""
        torch.manual_seed(self.seed)
        return new_model(self.world, layers=layers, hidden_size=self.sizes.hidden_size)

    def warmed_up(
        self, layers: int, lengths: Sequence[float] | None = None
    ) -> tuple[R2ecModel, float]:
        """A new model after its warm-up, on chains of these ``lengths`` (`WarmUp`), and the CPU
        seconds it took."""
        sizes, started = self.sizes, time.process_time()
        model = self.new_model(layers)
        settings = WarmUp(
            sizes.warmup_steps, sizes.warmup_item_steps, sizes.warmup_batch, lengths=lengths
        )
        warm_up(model, self.world, self.data, settings, seed=self.seed)
        return model, time.process_time() - started

    def recpo(
        self, model: R2ecModel, change: Callable[[int], Loss] | None = None, **others: Any
    ) -> Trained:
        """RecPO with the paper's objective, with a changed loss, or with ``others`` of its
        settings."""
        sizes = self.sizes
        settings: dict[str, Any] = {
            "per_device_train_batch_size": sizes.recpo_batch,
            "num_generations": sizes.generations,
            "temperature": 1.0,
            "top_k": 0,
            "loss_type": "sum",
            "lora_r": 16,
            "lora_alpha": 32,
            "learning_rate": sizes.recpo_learning_rate,
            "warmup_steps": min(4, sizes.recpo_steps),
            "refresh_steps": 5,
            # a whole step in one pass: rewards are permuted within it
            "max_tokens_per_microbatch": 1 << 20,
        }
        with TemporaryDirectory() as folder:
            config = self._config(folder, sizes.recpo_steps, **settings | others)
            trainer = RecPOTrainer(model, self.data, config)
            trainer.engine = JudgedEngine(trainer, self.world, Path(folder) / JUDGEMENTS)
            started = time.process_time()
            with changed_loss(change, self.seed):
                trainer.train()
            seconds = time.process_time() - started
            log = [record for record in read_log(folder) if "reward" in record]
            judged = read_judgements(Path(folder))
        curves = {
            "reward": [record["reward"] for record in log],
            "length": [record["completions/mean_length"] for record in log],
            "right": [record["right"] for record in judged],
        }
        return Trained(model, seconds, curves)

    def contrastive(
        self, load: Callable[[], R2ecModel], seconds: float
    ) -> tuple[R2ecModel, float, int]:
        """Direct mode, every weight trained for about so many CPU seconds (at least one step): the
        model, the seconds it took, and its steps."""
        few, more = CALIBRATION
        short, long = (self._contrastive(load(), steps)[1] for steps in CALIBRATION)
        step = max(long - short, 1e-3) / (more - few)
        steps = max(round(few + (seconds - short) / step), 1)
        return *self._contrastive(load(), steps), steps

    def _contrastive(self, model: R2ecModel, steps: int) -> tuple[R2ecModel, float]:
        settings = {
            "objective": "contrastive",
            "use_lora": False,
            "train_embeddings": True,
            "per_device_train_batch_size": self.sizes.direct_batch,
            "learning_rate": self.sizes.direct_learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": min(10, steps // 4),
            "refresh_steps": 0,
        }
        with TemporaryDirectory() as folder:
            trainer = RecPOTrainer(model, self.data, self._config(folder, steps, **settings))
            started = time.process_time()
            trainer.train()
        return model, time.process_time() - started

    def _config(self, folder: str, steps: int, **settings: Any) -> RecPOConfig:
        return RecPOConfig(
            output_dir=folder,
            max_steps=steps,
            max_completion_length=self.sizes.longest,
            index_scan="none",
            eval_steps=0,
            eval_samples=1,
            eval_direct=False,
            diagnostic_samples=0,
            save_steps=0,
            seed=self.seed,
            **settings,
        )

    # ---- measuring ------------------------------------------------------------------------------

    def metrics(self, ranks: np.ndarray) -> Metrics:
        """Of the test targets' ranks, int64 [X]."""
        return ranking_metrics(ranks, users=self.test.user)

    def written(self, model: R2ecModel, generations: int = 0) -> Ragged:
        """Reasonings about the test examples with their markers: X greedy ones, or X * G sampled
        ones as RecPO samples them."""
        engine, prompts = transformers_engine(model, self.assembler.builder), self.prompts
        rows = [Ragged.of([])]
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            found = engine.generate(
                part,
                user_keys=range(start, start + len(part)),
                num_generations=generations or 1,
                max_completion_length=self.sizes.longest,
                temperature=1.0,
                seed=self.seed,
                greedy=not generations,
            )
            rows.append(found.tokens)
        return Ragged.stack(rows)

    def ranked(self, model: R2ecModel, reasonings: Ragged | None = None) -> Metrics:
        """Metrics after ``reasonings``, one an example, or in direct mode."""
        return self.metrics(self.ranks(model, reasonings))

    def ranks(self, model: R2ecModel, reasonings: Ragged | None) -> np.ndarray:
        """Ranks of the test targets after X * G ``reasonings``, int64 [X * G]; None: direct mode.
        The item table is the model's own of now."""
        model.set_items(model.encode_items(self.data.data.catalog), scan="none")
        ranks, _ = rank_examples(model, self.assembler, self.data, self.test, reasonings=reasonings)
        return ranks

    @torch.no_grad()
    def confidence(self, model: R2ecModel, reasonings: Ragged) -> np.ndarray:
        """Log-probability of the item that is ranked first after each of X * G ``reasonings``,
        float32 [X * G]: what the model itself thinks of them. No target enters. The item table is
        used as it stands."""
        group = len(reasonings) // len(self.test)
        found = []
        for start in range(0, len(self.test), BATCH):
            part = slice(start, start + BATCH)
            written = reasonings[start * group : (start + BATCH) * group]
            states = states_after(model, self.prompts[part], written)
            seen = Ragged.of(self.data.exclude(self.test[part]))
            exclude = seen.select(np.arange(len(seen)).repeat(group)).tensors()
            first = model.top_items(states, 1, exclude=exclude).indices[:, 0]
            found.append(model.target_stats(states, first, exclude).log_prob.numpy())
        return np.concatenate(found)

    def right(self, model: R2ecModel, examples: Examples, written: Ragged) -> float:
        """Share of reasonings, one an example, that are the chain which the world walks."""
        histories = Ragged.of(self.data.exclude(examples, self.world.steps))
        texts = model.tokenizer.batch_decode([row.tolist() for row in written])
        marker = model.prompts.emb_token
        found = [
            judge_reasoning(self.world, text.split(marker)[0], history).right
            for text, history in zip(texts, histories, strict=True)
        ]
        return float(np.mean(found))


def forward_flops(model: R2ecModel, layers: int, tokens: float, written: float) -> float:
    """Operations of one recommendation of ``model`` with so many layers: ``tokens`` read or
    written, of which ``written`` went through the language-model head. Multiplications and
    additions of the products; causal attention."""
    layer = model.language_model.get_decoder().layers[0]
    weights = sum(parameter.numel() for parameter in layer.parameters())
    vocabulary, width = model.lm_head_weight.shape
    of_layer = 2.0 * weights * tokens + 2.0 * width * tokens**2
    return layers * of_layer + 2.0 * vocabulary * width * written


def layers_of_equal_cost(model: R2ecModel, layers: int, prompt: float, reasoning: float) -> int:
    """The fewest layers with which reading ``prompt`` tokens alone costs at least what reading
    them and writing ``reasoning`` tokens costs with ``layers``."""
    wanted, deeper = forward_flops(model, layers, prompt + reasoning, reasoning), layers
    while forward_flops(model, deeper, prompt, 0) < wanted:
        deeper += 1
    return deeper

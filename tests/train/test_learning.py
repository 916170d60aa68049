# ruff: noqa: E402  the benchmarks are scripts, found after their folder is on the path
"""RecPO learns to reason where reasoning must pay, and this test sees when it does not.

A toy chain world: 16 products in 3 colours, three steps from the last purchase to the next one.
After the warm-up the model writes chains of any length in either order, and the reward alone says
which of them tells the next purchase.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import changed_loss

from r2ec_fast import R2ecModel, RecPOConfig, RecPOTrainer
from r2ec_fast.data import RecDataset
from r2ec_fast.quickstart.language import new_model
from r2ec_fast.quickstart.warmup import WarmUp, warm_up
from r2ec_fast.quickstart.world import World
from r2ec_fast.report.plots import read_log

pytestmark = pytest.mark.slow
log = logging.getLogger(__name__)

WORLD = World(products=16, colours=3, steps=3, users=300, events=7, seed=0)
FAULTS = [
    changed_loss.flipped_sign,
    changed_loss.sum_of_advantages,
    changed_loss.log_probs_of_another_step,
    changed_loss.log_probs_at_another_temperature,
    changed_loss.item_weight_of_release_0_1,
]


@dataclass(frozen=True)
class Outcome:
    """Mean reward of the first and the last quarter of a run's steps, and test ndcg@10."""

    first: float
    last: float
    direct: float
    reasoned: float

    def complaints(self) -> list[str]:
        """What is missing of a run that learned to reason."""
        found = []
        if self.last < 2 * self.first:
            found.append(f"reward {self.first:.3f} -> {self.last:.3f}, expected twice as much")
        if self.reasoned < 3 * self.direct:
            found.append(
                f"ndcg@10 reasoned {self.reasoned:.3f}, expected three times direct "
                f"{self.direct:.3f}"
            )
        return found


Run = Callable[..., Outcome]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Other counts round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data() -> RecDataset:
    return WORLD.dataset()


@pytest.fixture(scope="module")
def warm(one_thread, data: RecDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model after its warm-up, on disk."""
    torch.manual_seed(0)
    model = new_model(WORLD, layers=2, hidden_size=96)
    warm_up(model, WORLD, data, WarmUp(language_steps=300, item_steps=100, batch=16))
    folder = tmp_path_factory.mktemp("warm") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(data: RecDataset, warm: Path, tmp_path: Path) -> Run:
    """RecPO from the warmed-up model, on one thread, with a changed loss or with the real one."""

    def train(change=None) -> Outcome:
        config = RecPOConfig(
            output_dir=str(tmp_path),
            max_steps=32,
            per_device_train_batch_size=12,
            num_generations=8,
            max_completion_length=20,
            temperature=1.0,
            top_k=0,
            reward_ndcg_k=5,  # one of three colours is right, so this is near all or nothing
            lora_r=16,
            lora_alpha=32,
            learning_rate=2e-3,
            warmup_steps=6,
            refresh_steps=10,
            index_scan="none",
            eval_steps=0,
            eval_samples=1,
            eval_direct=False,
            diagnostic_samples=0,
            save_steps=0,
            seed=0,
        )
        trainer = RecPOTrainer(R2ecModel.from_pretrained(warm), data, config)
        with changed_loss.changed_loss(change):
            trainer.train()
        reward = [record["reward"] for record in read_log(tmp_path) if "reward" in record]
        first, *_, last = (float(np.mean(part)) for part in np.array_split(reward, 4))
        direct, reasoned = (
            trainer.evaluate("test", reasoning=reasoning, samples=0)["eval_test_ndcg@10"]
            for reasoning in (False, True)
        )
        outcome = Outcome(first, last, direct, reasoned)
        log.info("%s", outcome)  # pytest --log-cli-level INFO shows it
        return outcome

    return train


def test_reasoning_is_learned(run: Run):
    outcome = run()
    assert not outcome.complaints(), outcome


def test_without_gradient_of_the_tokens_the_reward_does_not_rise(run: Run):
    outcome = run(changed_loss.no_token_gradient)
    assert outcome.last < 1.3 * outcome.first, outcome


@pytest.mark.filterwarnings("ignore:reduction 'token'")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_seen(run: Run, fault):
    outcome = run(fault)
    assert outcome.complaints(), outcome

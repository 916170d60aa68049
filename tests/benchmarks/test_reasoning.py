# ruff: noqa: E402  the benchmarks are scripts, found after their folder is on the path
"""The controls of reasoning: what each changes, how they are measured, kept and shown."""

from __future__ import annotations

import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import changed_loss
import reasoning
import reasoning_runs
from chain_lab import Lab, Sizes, layers_of_equal_cost
from reasoning_report import Store, mean_and_band, metrics_table
from reasoning_runs import RUNS, Figures, with_needed

from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.quickstart.language import new_model
from r2ec_fast.quickstart.reasoning import write_chain
from r2ec_kernels import RecPOLossConfig, linear_logprob, recpo_loss

TINY = Sizes(
    products=8,
    colours=2,
    steps=2,
    users=60,
    events=5,
    hidden_size=32,
    layers=1,
    warmup_steps=4,
    warmup_item_steps=2,
    warmup_batch=4,
    recpo_steps=3,
    recpo_batch=3,
    generations=3,
    direct_batch=4,
    test_examples=12,
)
ARGUMENTS = [f"--{name}={value}" for name, value in vars(TINY).items()]


@pytest.fixture(autouse=True)
def as_it_was():
    """The command sets threads, log level and progress bars of its process: put them back."""
    from transformers.utils import logging as transformers_logging

    logger, threads = logging.getLogger("r2ec_fast"), torch.get_num_threads()
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)
    if bars:
        transformers_logging.enable_progress_bar()


# ---- what is changed in the loss -----------------------------------------------------------------


class Step:
    """Two groups of three reasonings in float64, their rewards all different."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.trajectory = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 5, 5])
        self.hidden = drawn(12, 8).requires_grad_()
        self.weight, self.states, self.items = drawn(20, 8), drawn(6, 8), drawn(2, 8)
        self.targets = torch.randint(0, 20, (12,), generator=generator)
        self.rewards = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.4]], dtype=torch.float64)
        self.config = RecPOLossConfig()
        self.old = linear_logprob(self.hidden.detach(), self.weight, self.targets).log_prob

    def run(self, loss):
        """What the loss returns, and the gradient of the tokens' states."""
        out = loss(
            self.hidden,
            self.weight,
            self.targets,
            self.trajectory,
            self.rewards,
            self.states,
            self.items,
            torch.tensor([3, 5]),
            old_log_prob=self.old,
            num_tokens=torch.tensor(12),
            num_selected=torch.tensor(2),
            config=self.config,
        )
        if not out.loss.requires_grad:
            return out, torch.zeros_like(self.hidden)
        (gradient,) = torch.autograd.grad(out.loss, self.hidden, allow_unused=True)
        return out, torch.zeros_like(self.hidden) if gradient is None else gradient


def test_permuted_rewards_are_those_of_the_step_in_another_place():
    step = Step()
    plain, permuted = step.run(recpo_loss)[0], changed_loss.permuted_rewards(1)
    seen = []

    def spy(hidden, weight, targets, trajectory, rewards, *rest, **settings):
        seen.append(rewards)
        return recpo_loss(hidden, weight, targets, trajectory, rewards, *rest, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changed_loss, "recpo_loss", spy)
        step.run(permuted)
    assert sorted(seen[0].flatten().tolist()) == sorted(step.rewards.flatten().tolist())
    assert not torch.equal(seen[0], step.rewards) and plain.loss.isfinite()


def test_permuted_rewards_need_the_whole_step_in_one_pass():
    step = Step()
    step.rewards, step.states, step.trajectory = (
        step.rewards[:1],
        step.states[:3],
        step.trajectory % 3,
    )
    with pytest.raises(ValueError, match="max_tokens_per_microbatch"):
        step.run(changed_loss.permuted_rewards())


@pytest.mark.parametrize("change", ["no_token_gradient", "sum_of_advantages"])
def test_tokens_without_a_gradient(change):
    step = Step()
    _, gradient = step.run(recpo_loss)
    assert gradient.norm() > 0.1
    _, changed = step.run(getattr(changed_loss, change)())
    assert changed.norm() < 1e-12


@pytest.mark.filterwarnings("ignore:reduction 'token'")
def test_the_item_weight_of_release_0_1_is_one_over_the_groups():
    step = Step()
    out, gradient = step.run(changed_loss.item_weight_of_release_0_1())
    config = replace(step.config, reduction="token", item_weight=0.0)
    plain, of_tokens = step.run(
        lambda *states, **settings: recpo_loss(*states, **(settings | {"config": config}))
    )
    # ratios of items are 1: minus the best advantage of each group, over B m = 2 groups
    expected = plain.loss - plain.advantages.amax(1).sum() / 2
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradient, of_tokens)


def test_the_flipped_sign_turns_the_gradient_round():
    step = Step()
    step.config = replace(step.config, item_weight=0.0)
    _, gradient = step.run(recpo_loss)
    _, flipped = step.run(changed_loss.flipped_sign())
    torch.testing.assert_close(flipped, -gradient)


def test_stale_log_probabilities_are_those_of_the_call_before():
    step, loss = Step(), changed_loss.log_probs_of_another_step()
    first, _ = step.run(loss)
    assert float(first.ratio) == pytest.approx(1)
    own = step.old
    step.old = own[:5]  # a shorter step: its log-probabilities are taken round
    with pytest.raises(ValueError, match="old_log_prob"):
        step.run(recpo_loss)
    step.old = own + math.log(2)
    second, _ = step.run(loss)
    assert float(second.ratio) == pytest.approx(1)  # still those of the first call
    third, _ = step.run(loss)
    assert float(third.ratio) == pytest.approx(0.5)


def test_log_probabilities_at_another_temperature():
    step = Step()
    out, _ = step.run(changed_loss.log_probs_at_another_temperature())
    log_prob = linear_logprob(step.hidden.detach(), step.weight, step.targets).log_prob
    hot = linear_logprob(step.hidden.detach(), step.weight, step.targets, temperature=2.0).log_prob
    assert float(out.ratio) == pytest.approx(float((log_prob - hot).exp().mean()))


# ---- the lab -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab(TINY, 0)


@pytest.fixture(scope="module")
def model(lab: Lab):
    torch.manual_seed(0)
    made = new_model(lab.world, layers=1, hidden_size=32)
    made.set_items(made.encode_items(lab.data.data.catalog), scan="none")
    return made


def test_the_confidence_is_the_likeliest_items_probability(lab, model):
    written = lab.written(model, 2)
    found = lab.confidence(model, written)
    seen = Ragged.of(lab.data.exclude(lab.test))
    table = torch.nn.functional.normalize(model.item_table, dim=1)
    for i in range(len(lab.test)):
        for j in (0, 1):
            row = [*lab.prompts[i].tolist(), *written[2 * i + j].tolist()]
            state = torch.nn.functional.normalize(model.encode_rows([row]), dim=1)
            scores = (state @ table.T)[0] / model.temperature
            scores[seen[i]] = -math.inf
            expected = float(scores.max() - scores.logsumexp(0))
            assert found[2 * i + j] == pytest.approx(expected, abs=1e-4)


def test_right_reasonings_are_counted(lab, model):
    some = lab.test[:4]
    histories = Ragged.of(lab.data.exclude(some, lab.world.steps))
    texts = [write_chain(lab.world.chain(history)) for history in histories]
    texts[1] = write_chain(lab.world.chain(histories[1], steps=0))
    builder = lab.assembler.builder
    rows = Ragged.of(builder.tokenizer(texts, add_special_tokens=False).input_ids)
    assert lab.right(model, some, rows.append(builder.marker_ids)) == 0.75


def test_fillers_are_as_long_as_what_they_replace(lab):
    marker = lab.assembler.builder.marker_ids
    written = Ragged.of([[7, 8, 9], [], [5]]).append(marker)
    fillers = reasoning_runs._fillers(lab, written)
    assert fillers.lengths.tolist() == written.lengths.tolist()
    text = lab.assembler.builder.tokenizer.decode(fillers[0].tolist())
    assert text == "...<answer>"


def test_a_deeper_model_costs_at_least_as_much(model):
    # so wide a prompt that the products of the layers are nearly all: 100 / 60 of two layers
    assert layers_of_equal_cost(model, 3, 60.0, 0.0) == 3
    weights = sum(p.numel() for p in model.language_model.get_decoder().layers[0].parameters())
    vocabulary, width = model.lm_head_weight.shape
    reasoned = 2 * (2 * weights * 100 + 2 * width * 100**2) + 2 * vocabulary * width * 40
    layer = 2 * weights * 60 + 2 * width * 60**2
    assert layers_of_equal_cost(model, 2, 60.0, 40.0) == math.ceil(reasoned / layer)


def test_the_training_time_is_met():
    seconds, counts = {10: 1.5, 30: 2.5}, []
    lab = Lab(TINY, 0)
    lab._contrastive = lambda model, steps: (  # a step costs 0.05 s, and 1 s comes once
        model,
        seconds.get(steps) or counts.append(steps) or 1 + 0.05 * steps,
    )
    _, took, steps = lab.contrastive(lambda: None, 6.0)
    assert (took, steps, counts) == (6.0, 100, [100])


# ---- files and tables ----------------------------------------------------------------------------


def test_the_band_is_students():
    assert mean_and_band([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / math.sqrt(3)), rel=1e-6)
    mean, band = mean_and_band([0.5])
    assert mean == 0.5 and math.isnan(band)


def test_the_table_has_a_row_a_method():
    def figures(value: float) -> Figures:
        row = "RecPO, reasoned"
        return Figures({row: {"ndcg@10": value}}, seconds={row: 40.0})

    text = metrics_table({0: {"recpo": figures(0.4)}, 1: {"recpo": figures(0.6)}})
    assert "| RecPO, reasoned | 0.500 | ±1.271 | 2 | 40 |" in text


def test_a_store_keeps_runs_and_refuses_others(tmp_path):
    store = Store(tmp_path, {"commit": "a"})
    figures = Figures({"x": {"ndcg@10": 0.25}}, {"x": 1.5}, {"reward": [0.1]}, {"steps": 3.0})
    store.add(3, "recpo", figures)
    assert Store(tmp_path, {"commit": "a"}).every() == {3: {"recpo": figures}}
    with pytest.raises(ValueError, match="commit 'a', this one has 'b'"):
        Store(tmp_path, {"commit": "b"})


def test_runs_bring_what_they_need():
    assert with_needed(["deeper"]) == ["warm-up", "recpo", "deeper"]
    assert with_needed(list(reversed(RUNS))) == list(RUNS)
    with pytest.raises(ValueError, match="runs: expected some of counting, .*, got 'all'"):
        with_needed(["all"])


# ---- the command ---------------------------------------------------------------------------------


def check_outputs(folder: Path, seeds: int) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert len(results["seeds"]) == seeds and results["settings"]["sizes"] == vars(TINY)
    assert (folder / "reasoning.png").read_bytes().startswith(b"\x89PNG")
    assert "| RecPO, fillers instead |" in (folder / "table.md").read_text()


def test_the_command_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    command = [*ARGUMENTS, f"--output_dir={tmp_path}", "--runs", "recpo", "best-of-group"]
    assert reasoning.main([*command, "--seeds", "0"]) == 0
    check_outputs(tmp_path, 1)
    assert "seed 0, recpo" in capsys.readouterr().out
    for name in ("warm-up", "recpo"):
        monkeypatch.setitem(RUNS, name, replace(RUNS[name], do=None))  # may not be done again
    (tmp_path / "seed-0" / "best-of-group.json").unlink()
    assert reasoning.main([*command, "--seeds", "0"]) == 0
    assert "seed 0, best-of-group" in capsys.readouterr().out
    assert reasoning.main([*command, "--recpo_steps=9"]) == 2
    assert "output_dir: " in capsys.readouterr().err


@pytest.mark.slow
def test_every_run_in_a_tiny_world(tmp_path):
    assert reasoning.main([*ARGUMENTS, f"--output_dir={tmp_path}", "--seeds", "0", "1"]) == 0
    check_outputs(tmp_path, 2)
    table = (tmp_path / "table.md").read_text()
    for row in ("best possible", "direct, deeper", "rewards permuted", "one step more than shown"):
        assert f"| {row}" in table
    found = Store(tmp_path, {}).every()
    for runs in found.values():
        assert list(runs) == list(RUNS)
        assert all(np.isfinite(m["ndcg@10"]) for run in runs.values() for m in run.rows.values())

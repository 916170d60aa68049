"""A training run on the Triton kernels: which of them it launches, and what it learns."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from _support.toy import toy_dataset, toy_model
from _support.training import RUN

from r2ec_fast.config import RecPOConfig
from r2ec_fast.train.trainer import RecPOTrainer
from r2ec_kernels.topk.api import TopK

EXTRA_ITEMS = 240  # so that a search scans groups of rows instead of scoring every row

# Sums of float32 in another order; and Adam's first steps divide a gradient by its own size, which
# rounding moves where it is tiny. A hundredth of a step (RUN's learning rate) at most.
TOLERANCE = {"rtol": 1e-4, "atol": 3e-5}


class Run(NamedTuple):
    records: list[dict[str, float]]
    parameters: dict[str, torch.Tensor]
    best: TopK  # of a search of the table after training


def trained(directory: Path, device: str, **changes) -> Run:
    settings = {**RUN, "max_steps": 2, "eval_steps": 1, "output_dir": str(directory), **changes}
    model = toy_model(dtype=torch.float32).to(device)
    trainer = RecPOTrainer(model, toy_dataset(), RecPOConfig(**settings))
    trainer.train()
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    timed = ("time", "perf/", "sampling/")
    records = [
        {name: value for name, value in json.loads(line).items() if not _any_in(timed, name)}
        for line in lines
    ]
    parameters = {name: p.detach().cpu() for name, p in trainer.parameters.items()}
    states = model.read_out([[5, 6, 7], [8, 9]]).detach()
    assert model.index is not None
    generator = torch.Generator().manual_seed(0)
    model.index.append(torch.randn(EXTRA_ITEMS, states.shape[1], generator=generator).to(device))
    return Run(records, parameters, model.top_items(states, 3, exclude=[[3], []]))


def _any_in(parts: tuple[str, ...], name: str) -> bool:
    return any(part in name for part in parts)


@pytest.fixture
def launches(monkeypatch) -> Counter[str]:
    """How often each Triton kernel was launched, by name."""
    from triton.runtime import interpreter, jit

    names: Counter[str] = Counter()
    for kind, attribute in ((interpreter.GridExecutor, "__call__"), (jit.JITFunction, "run")):
        launch = getattr(kind, attribute)

        def counting(self, *args, launch=launch, **kwargs):
            names[self.fn.__name__.strip("_")] += 1
            return launch(self, *args, **kwargs)

        monkeypatch.setattr(kind, attribute, counting)
    return names


@pytest.mark.parametrize(
    "changes", [{}, {"use_lora": False, "train_embeddings": True}], ids=["adapters", "whole model"]
)
def test_a_run_on_triton_equals_one_on_torch(device, changes, launches, monkeypatch, tmp_path):
    monkeypatch.setenv("R2EC_IMPL", "torch")
    expected = trained(tmp_path / "torch", device, **changes)
    assert not launches
    monkeypatch.setenv("R2EC_IMPL", "triton")
    found = trained(tmp_path / "triton", device, **changes)

    used = {
        "search": {"group_best_kernel", "rescore_kernel"},
        "rank": {"stats_kernel", "compare_kernel"},
        "reward and advantage": {"reward_kernel"},
        "loss": {"update_kernel"} | ({"grad_kernel"} if changes else set()),
    }
    for part, names in used.items():
        assert names <= launches.keys(), (part, launches)
    assert len(found.records) == len(expected.records) == 4
    for ours, theirs in zip(found.records, expected.records, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert found.parameters.keys() == expected.parameters.keys()
    for name, value in found.parameters.items():
        torch.testing.assert_close(value, expected.parameters[name], **TOLERANCE)
    torch.testing.assert_close(found.best.scores, expected.best.scores)
    assert found.best.indices.equal(expected.best.indices)

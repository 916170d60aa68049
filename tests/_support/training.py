"""Toy training runs that several test modules share, in this process and in others."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from _support.processes import environment
from _support.toy import toy_dataset, toy_model, toy_reasonings
from safetensors.torch import load_file

from r2ec_fast.config import RecPOConfig
from r2ec_fast.train.checkpoint import TRAINABLE_FILE
from r2ec_fast.train.trainer import RecPOTrainer

OBJECTIVES = ("recpo", "contrastive", "reasoning_sft")
RUN = {
    "num_generations": 2,
    "max_completion_length": 5,
    "temperature": 1.2,
    "top_k": 0,
    "learning_rate": 3e-3,
    "warmup_steps": 0,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "refresh_steps": 3,
    "lora_alpha": 8,
    "diagnostic_samples": 0,
}


def toy_trainer(directory: Path, objective: str = "recpo", *, engine=None, **changes):
    """A trainer of the toy model on the toy data, and on toy reasonings where it takes such."""
    given = {}
    settings = {**RUN, "output_dir": str(directory), "objective": objective, **changes}
    if objective == "reasoning_sft":
        given["reasonings"] = toy_reasonings(toy_dataset())
        settings = {"direct_weight": 0.5, **settings, "max_completion_length": 32}
    return RecPOTrainer(toy_model(), toy_dataset(), RecPOConfig(**settings), engine=engine, **given)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: other counts round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(directory: Path, objective: str = "recpo", **changes) -> tuple[dict, dict]:
    """Final metrics and trained parameters of a toy run, on one thread."""
    with one_thread():
        trainer = toy_trainer(directory, objective, **changes)
        metrics = trainer.train()
        if trainer.config.fsdp:  # the processes have parted: what they saved together
            return metrics, load_file(directory / "best" / TRAINABLE_FILE)
        return metrics, {n: p.detach().clone() for n, p in trainer.parameters.items()}


def lines(directory: Path) -> list[dict]:
    """The records of metrics.jsonl, without what depends on the machine."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if not k.endswith("_time") and not k.startswith("perf/")}
        for r in records
    ]


def same(first: dict, second: dict, **tolerance) -> None:
    """Equal names and values, within the tolerance of `torch.testing.assert_close`."""
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


SCRIPT = """
import os
from pathlib import Path
import torch
from _support.training import run
{before}
metrics, parameters = run(Path({out!r}), {objective!r}, **{changes!r})
torch.save((metrics, parameters), {out!r} + f"/result-{{os.environ.get('RANK', 0)}}.pt")
"""


def launch(
    out: Path,
    objective: str,
    changes: dict,
    rank: int = 0,
    size: int = 1,
    port: int = 0,
    *,
    before: str = "",
    **popen,
) -> subprocess.Popen:
    """The toy run in a process of its own, `rank` of `size`; `before` is code it runs first. Its
    result is in `out/result-{rank}.pt`."""
    out.mkdir(exist_ok=True)
    code = SCRIPT.format(
        out=str(out),
        objective=objective,
        changes=changes,
        before=before,
    )
    variables = {}
    if size > 1:
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
    return subprocess.Popen([sys.executable, "-c", code], env=environment(**variables), **popen)


def launch_two(out: Path, objective: str, changes: dict, **arguments) -> list[subprocess.Popen]:
    """Two gloo processes of one run."""
    port = free_port()
    return [launch(out, objective, changes, rank, 2, port, **arguments) for rank in range(2)]


def two(out: Path, objective: str, changes: dict, **arguments) -> list[tuple[dict, dict]]:
    """Final metrics and trained parameters of both processes of one run."""
    processes = launch_two(out, objective, changes, **arguments)
    assert [p.wait(timeout=240) for p in processes] == [0, 0]
    return [torch.load(out / f"result-{rank}.pt") for rank in range(2)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

"""One model, several threads: each gets what it would get alone."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from _support.toy import toy_model

from r2ec_fast.model.hf_compat import attention_implementation, eval_mode, exclusive
from r2ec_fast.rollout import TransformersEngine

THREADS = 4


def rows(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 60, (n,), generator=generator).tolist() for n in lengths]


def in_threads(work, jobs):
    """`work(job)` of all jobs by several threads that start together."""
    barrier = threading.Barrier(THREADS)

    def run(job):
        if job < THREADS:
            barrier.wait(timeout=30)
        return work(job)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(jobs), timeout=120))


@pytest.mark.parametrize("lora", [False, True])
def test_states_of_threads_are_those_of_one(lora):
    model = toy_model()
    if lora:
        model.add_lora(r=2, dropout=0.5)
    model.train()

    def work(job):
        return model.encode_rows(rows(job, 5 + job, 9, 3))

    alone = [work(job) for job in range(24)]
    for want, found in zip(alone, in_threads(work, 24), strict=True):
        assert torch.equal(want, found)
    assert model.backbone.training


def test_reasonings_of_threads_are_those_of_one():
    model = toy_model()
    engine = TransformersEngine(model.backbone, model.tokenizer)

    def work(job):
        if job % 3 == 2:  # other passes in between
            return model.encode_rows(rows(job, 8, 4)).flatten()
        rollouts = engine.generate(
            rows(job, 6 + job % 4, 5),
            user_keys=[job, job + 1],
            num_generations=2,
            max_completion_length=6,
            seed=job,
            step=0,
        )
        return torch.from_numpy(rollouts.values)

    alone = [work(job) for job in range(18)]
    for want, found in zip(alone, in_threads(work, 18), strict=True):
        assert torch.equal(want, found)


def test_a_mode_holds_the_models_lock():
    model = toy_model()
    model.add_lora(r=2)
    entered, leave = threading.Event(), threading.Event()

    def holds():
        with attention_implementation(model.language_model, "eager"), eval_mode(model):
            entered.set()
            leave.wait(timeout=30)

    thread = threading.Thread(target=holds)
    thread.start()
    assert entered.wait(timeout=30)
    got = threading.Event()

    def wants():
        with exclusive(model.backbone):
            got.set()

    other = threading.Thread(target=wants)
    other.start()
    assert not got.wait(timeout=0.2)
    leave.set()
    thread.join()
    other.join()
    assert got.is_set()


def test_a_model_is_copied_and_pickled_without_its_lock():
    model = toy_model(dtype=torch.float32)
    model.encode_rows(rows(0, 5))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.encode_rows(rows(0, 5)), model.encode_rows(rows(0, 5)))

"""Direct requests before reasonings: what the worker does in which order."""

from __future__ import annotations

import threading

import pytest
from _support.serving import toy_service

from r2ec_fast.serve import worker as worker_module
from r2ec_fast.serve.service import Event, Request
from r2ec_fast.serve.worker import DIRECT_IN_A_ROW, WorkerSettings


def request(number: int, reasoned: bool) -> Request:
    history = [Event("i1"), Event(f"i{2 + number}")]
    return Request(history=history, k=2, reasoned=reasoned, max_reasoning_tokens=6)


class Recorded:
    """A service that computes a direct prompt a pass, and the passes of its worker: "direct",
    "join" (a reasoning's prompt is read) and "step" (a token of the reasonings). Its first pass
    waits for ``go``."""

    def __init__(self, monkeypatch):
        self.service = toy_service(settings=WorkerSettings(together=False), cache_entries=1)
        self.passes: list[str] = []
        self.entered, self.go = threading.Event(), threading.Event()
        worker = self.service.worker
        for owner, name, told in (
            (worker.model, "encode_rows", "direct"),
            (worker, "_join", "join"),
            (worker._decoder, "step", "step"),
        ):
            monkeypatch.setattr(owner, name, self._telling(getattr(owner, name), told))

    def _telling(self, work, told):
        def run(*arguments, **settings):
            self.entered.set()
            assert self.go.wait(30)
            self.passes.append(told)
            return work(*arguments, **settings)

        return run

    def answered(self, jobs) -> list[str]:
        self.go.set()
        for job in jobs:
            job.future.result(timeout=60)
        self.service.close()
        return self.passes


@pytest.fixture
def recorded(monkeypatch):
    return Recorded(monkeypatch)


def test_a_reasoning_begins_when_no_direct_request_waits(recorded, monkeypatch):
    monkeypatch.setattr(worker_module, "PATIENCE", 1000.0)
    first = recorded.service.submit(request(0, reasoned=False))
    assert recorded.entered.wait(30)
    jobs = [recorded.service.submit(request(1, reasoned=True))]
    jobs += [recorded.service.submit(request(n, reasoned=False)) for n in range(2, 12)]
    passes = recorded.answered([first, *jobs])
    assert passes[:12] == ["direct"] * 11 + ["join"] and passes[12] == "step"


def test_a_reasoning_that_has_waited_long_begins_between_direct_requests(recorded, monkeypatch):
    monkeypatch.setattr(worker_module, "PATIENCE", 0.0)
    first = recorded.service.submit(request(0, reasoned=False))
    assert recorded.entered.wait(30)
    jobs = [recorded.service.submit(request(1, reasoned=True))]
    jobs += [recorded.service.submit(request(n, reasoned=False)) for n in range(2, 12)]
    passes = recorded.answered([first, *jobs])
    assert passes.index("join") == DIRECT_IN_A_ROW and passes.count("direct") == 11


def test_reasonings_under_way_get_a_token_after_a_few_direct_requests(recorded):
    reasoning = recorded.service.submit(request(0, reasoned=True))
    assert recorded.entered.wait(30)
    jobs = [recorded.service.submit(request(n, reasoned=False)) for n in range(1, 11)]
    passes = recorded.answered([reasoning, *jobs])
    few = ["direct"] * DIRECT_IN_A_ROW
    assert passes[:13] == ["join", "step", *few, "step", *few, "step", "direct"]

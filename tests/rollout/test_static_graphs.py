"""Steps that a CUDA graph replays: against a stand-in for torch.cuda, and on a GPU."""

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from _support.backbones import KINDS
from _support.static_rows import DRAWS, assert_equal_rows, rows_of

from r2ec_fast.rollout.static import loop, stepper
from r2ec_fast.rollout.static.slots import Slots
from r2ec_fast.rollout.static.stepper import WARM_UP, Stepper


class Aside(str):
    def wait_stream(self, other):
        pass


class Device:
    """Stands in for torch.cuda: a capture records the calls of a step, a replay makes them."""

    def __init__(self, fails=False):
        self.fails, self.recording, self.log = fails, None, []
        self.CUDAGraph, self.Stream = self._graph, lambda device: Aside("aside")
        self.default_generators, self.at = [self], "here"

    def _graph(self):
        self.calls = []
        return self

    def step(self):
        if self.recording is None:
            self.log.append(f"step {self.at}")
        else:
            self.recording.append("replayed")
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def replay(self):
        assert self.at == "here"
        self.log += self.calls

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        assert stream == "aside"
        self.recording, self.at = graph.calls, stream
        try:
            yield
            self.at = "here"  # not after an error, as in torch
        finally:
            self.recording = None

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def stream(self, stream):
        self.at = stream
        yield
        self.at = "here"

    def set_stream(self, stream):
        self.at = stream.name

    def current_stream(self):
        return SimpleNamespace(name=self.at, wait_stream=lambda other: None)

    def current_device(self):
        return 0

    def clone_state(self):
        return "state"

    def graphsafe_set_state(self, state):
        self.log.append(state)


@pytest.fixture
def clean():
    """What a process keeps of its steppers is dropped before a test and after it."""
    for forget in (stepper._warn.cache_clear, stepper._side_stream.cache_clear):
        forget()
    yield
    for forget in (stepper._warn.cache_clear, stepper._side_stream.cache_clear):
        forget()


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_replays_steps_after_warm_up_and_errors_leave_steps(
    monkeypatch, caplog, clean, fails
):
    for _ in range(2):
        cuda = Device(fails)
        monkeypatch.setattr(stepper.torch, "cuda", cuda)
        step = Stepper(cuda.step, torch.device("cuda:0"))
        for _ in range(WARM_UP + 4):
            step()
        rest = ["state", *["step here"] * 4] if fails else ["replayed"] * 4
        assert cuda.log == [*["step aside"] * WARM_UP, *rest]
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    reason = "rollouts run without a CUDA graph, which is slower: operation not permitted when"
    assert len(messages) == fails and all(reason in m and "more" not in m for m in messages)


def test_no_graph_on_a_cpu(monkeypatch, clean):
    cuda = Device()
    monkeypatch.setattr(stepper.torch, "cuda", cuda)
    step = Stepper(cuda.step, torch.device("cpu"))
    for _ in range(WARM_UP + 3):
        step()
    assert cuda.log == ["step here"] * (WARM_UP + 3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("draws", DRAWS)
def test_a_captured_graph_gives_the_rows_of_eager_steps(
    make_model, tokenizer, prompts, monkeypatch, caplog, clean, name, draws
):
    model = make_model(name).to("cuda")
    changes = DRAWS[draws] | {"max_completion_length": 40}
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))
    )
    got = rows_of("static", model, tokenizer, prompts, **changes)
    assert replays and "without a CUDA graph" not in caplog.text
    captured = len(replays)
    shared = rows_of("shared", model, tokenizer, prompts, **changes)
    monkeypatch.setattr(loop, "Stepper", lambda step, device: step)
    eager = rows_of("static", model, tokenizer, prompts, **changes)
    assert len(replays) == captured
    assert_equal_rows(got, eager)
    assert_equal_rows(got, shared)


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_eagerly(
    make_model, tokenizer, prompts, monkeypatch, caplog, clean
):
    model = make_model("llama").to("cuda")
    changes = {"max_completion_length": 40}
    right = rows_of("shared", model, tokenizer, prompts, **changes)
    step = Slots.step
    monkeypatch.setattr(Slots, "step", lambda slots: (step(slots), slots.finished.any().item()))
    with caplog.at_level(logging.WARNING):
        assert_equal_rows(rows_of("static", model, tokenizer, prompts, **changes), right)
    assert "without a CUDA graph" in caplog.text
    torch.rand(3, device="cuda")  # the generator is as it was

"""Calls a step, or replays it from a CUDA graph."""

import logging
from collections.abc import Callable
from functools import cache
from threading import Lock

import torch

logger = logging.getLogger(__name__)

WARM_UP = 3  # steps before a capture: libraries choose their algorithms and take their workspaces

_side_stream_lock = Lock()


class Stepper:
    """Runs a step once a call. On a CUDA device the first calls run it on a side stream, the next
    one captures it, and from then on a graph replays it: one launch for all of its kernels.

    The step must work in place, on tensors that stay, and leave the host out. Where it cannot be
    captured a warning says why, once a process, and every call runs it.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step, self._device = step, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._may_capture = device.type == "cuda"
        self._warm_up = WARM_UP

    def __call__(self) -> None:
        if not self._may_capture:
            self._step()
            return
        with torch.cuda.device(self._device):
            if self._graph is None and self._warm_up == 0:
                self._capture()
            if self._graph is not None:
                self._graph.replay()
            elif self._warm_up > 0:
                self._warm_up -= 1
                self._step_aside()
            else:
                self._step()

    def _step_aside(self) -> None:
        here, aside = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        with _side_stream_lock:
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                self._step()
            here.wait_stream(aside)

    def _capture(self) -> None:
        """Record a step without running it."""
        here, device = torch.cuda.current_stream(), torch.cuda.current_device()
        generator = torch.cuda.default_generators[device]
        state = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(
            graph,
            stream=_side_stream(device),
            capture_error_mode="thread_local",  # other threads may use the device meanwhile
        )
        try:
            with _side_stream_lock, capture:
                self._step()
        except RuntimeError as error:
            # a capture that breaks off leaves its stream in place and the generator waiting
            torch.cuda.set_stream(here)
            generator.graphsafe_set_state(state)
            self._may_capture = False
            _warn(str(error).split("\n")[0])
        else:
            self._graph = graph


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    # one a device: libraries keep a workspace for every stream that they have seen
    return torch.cuda.Stream(device)


@cache
def _warn(reason: str) -> None:
    logger.warning("rollouts run without a CUDA graph, which is slower: %s", reason)

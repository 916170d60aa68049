"""Calls a step, or replays it from a CUDA graph."""

import logging
from collections.abc import Callable
from functools import cache

import torch

logger = logging.getLogger(__name__)

WARM_UP = 3  # steps before a capture: libraries choose their algorithms and take their workspaces


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
        self._aside = torch.cuda.Stream(device) if self._may_capture else None

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
        here = torch.cuda.current_stream()
        assert self._aside is not None
        self._aside.wait_stream(here)
        with torch.cuda.stream(self._aside):
            self._step()
        here.wait_stream(self._aside)

    def _capture(self) -> None:
        """Record a step without running it."""
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state = generator.clone_state()
        try:
            # other threads may use the device meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:
            # a capture that breaks off leaves the generator waiting for the capture's end
            generator.graphsafe_set_state(state)
            self._may_capture = False
            _warn(str(error).split("\n")[0])
        else:
            self._graph = graph


@cache
def _warn(reason: str) -> None:
    logger.warning("rollouts run without a CUDA graph, which is slower: %s", reason)

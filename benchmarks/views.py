"""Other views of a case: what a call launches on the device, and its replay as a CUDA graph."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import torch
from harness import Case, Entry, Unavailable
from machine import graphed, quiet_profile, synchronize

SHOWN = 4  # kernels named in a remark
_WAITS = "cudaStreamSynchronize"  # what a value read by the host costs


def profiled(entry: Entry, method: str) -> Entry:
    """The same call, its row with the number of device kernels and where their time went."""

    def build() -> list[Case]:
        [case] = [case for case in entry.build() if case.method == method]
        run, device = case.run, "cuda" if torch.cuda.is_available() else "cpu"
        return [dataclasses.replace(case, method="profile", remark=lambda: launches(run, device))]

    return dataclasses.replace(
        entry, op=f"profile of {entry.op}", methods=("profile",), build=build, section="profile"
    )


def launches(run: Callable[[], object], device: str) -> str:
    """ "41 device operations, 0.350 ms, 2 waits: _scan_kernel 0.300 ms x1, ..." of one call.

    On a CPU the operators are counted, and no time is given.
    """
    with quiet_profile(device) as trace:
        run()
        synchronize(device)
    events = list(trace.profiler.kineto_results.events())
    if device == "cpu":
        count = sum(event.name().startswith("aten::") for event in events)
        return f"{count} operators, counted on a CPU"
    on_device = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA]
    counts = Counter(event.name() for event in on_device)
    busy: Counter[str] = Counter()
    for event in on_device:
        busy[event.name()] += event.duration_ns()
    waits = sum(event.name() == _WAITS for event in events)
    named = [f"{n[:40]} {ns / 1e6:.3f} ms x{counts[n]}" for n, ns in busy.most_common(SHOWN)]
    total = f"{len(on_device)} device operations, {sum(busy.values()) / 1e6:.3f} ms, {waits} waits"
    return f"{total}: {', '.join(named)}"


def replayed(entry: Entry, method: str) -> Entry:
    """The same call beside the replay of its CUDA graph, whose result is checked as the call's."""

    def build() -> list[Case]:
        [case] = [case for case in entry.build() if case.method == method]
        replay = _Replay(case.run)
        return [
            case,
            dataclasses.replace(case, method="graph replay", run=replay, prepare=replay.capture),
        ]

    methods = (method, "graph replay")
    op = f"graph of {entry.op}"
    return dataclasses.replace(
        entry, op=op, methods=methods, build=build, versus=method, section="graph"
    )


class _Replay:
    """A call that is captured before its first run."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run

    def capture(self) -> None:
        if not torch.cuda.is_available():
            raise Unavailable("CUDA graphs need a GPU")
        self.run = graphed(self.run)

    def __call__(self) -> object:
        return self.run()

"""The machine a benchmark runs on: its name, what it reaches, its clock and its memory meter."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rows import Machine

if TYPE_CHECKING:
    from torch.profiler import profile

PACKAGES = ("torch", "triton", "transformers", "numpy")
ROOT = Path(__file__).resolve().parent.parent


def pick_device() -> str:
    """ "cuda" (CUDA or ROCm) where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(device: str) -> torch.dtype:
    """float32 on CPUs, many of which multiply bfloat16 in software; bfloat16 on GPUs."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def model_dtype(device: str) -> torch.dtype:
    """Of language models: bfloat16 on GPUs and on CPUs with AMX tiles for it, else
    float32."""
    has_units = device == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.bfloat16 if device == "cuda" or has_units else torch.float32


def describe(device: str, *, rates: bool = True) -> Machine:
    """The header of a run on ``device``; without ``rates`` nothing is measured (they are nan)."""
    import r2ec_kernels

    dtype = compute_dtype(device)
    return Machine(
        name=torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        versions=", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        commit=commit(),
        source=str(Path(r2ec_kernels.__file__).resolve().parent),
        clocks=_clocks(device),
        copy_gb_s=_copy_rate(device) / 1e9 if rates else float("nan"),
        matmul_tflop_s=matmul_rate(device, dtype) / 1e12 if rates else float("nan"),
    )


def commit() -> str:
    """Short hash of the checkout, with a + where tracked files differ from it."""
    try:
        short = _git("rev-parse", "--short", "HEAD")
        return short + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Timer:
    """Seconds of single calls. On a GPU by events, after the L2 cache was overwritten."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.flush = None
        if device == "cuda":
            size = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 1 << 27)
            self.flush = torch.empty(max(2 * size, 1 << 27), dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        if self.flush is None:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` captured once as a CUDA graph; the result replays it and returns the captured output.

    Raises RuntimeError where the call cannot be captured (it waits for the GPU, for example).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> object:
        graph.replay()
        return out

    return replay


def with_peak(run: Callable[[], object], device: str) -> tuple[object, float, float]:
    """(result, seconds, MiB that one call held at most above what was held before it).

    On a CPU of the whole process, so that libraries outside torch count; small calls that reuse
    freed memory read low.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        synchronize(device)
        started = time.perf_counter()
        result = run()
        synchronize(device)
        seconds = time.perf_counter() - started
        return result, seconds, (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    resettable = os.access("/proc/self/clear_refs", os.W_OK)
    if resettable:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
    before = _status_kib("VmRSS")
    started = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - started
    peak = (_status_kib("VmHWM") - before) / 1024 if resettable else float("nan")
    return result, seconds, peak


def quiet_profile(device: str, **how: bool) -> profile:
    """torch's profiler for a block, without its line on the terminal."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device == "cuda" else []
    # without acc_events torch 2.11 warns, even of the first cycle
    return profile(activities=activities, acc_events=True, **how)


def torch_peak_mib(run: Callable[[], object]) -> float:
    """MiB that torch allocated at most during one call on a CPU, above what it held before."""
    with quiet_profile("cpu", profile_memory=True) as trace:
        run()
    held = most = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _clocks(device: str) -> str:
    if device != "cuda" or torch.version.hip:
        return "not read"
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "not read"
    return f"as found (SM, SM max, memory, power limit): {done.stdout.splitlines()[0]}"


def _best(run: Callable[[], object], device: str) -> float:
    timer = Timer(device)
    run()
    return min(timer(run) for _ in range(5))


def _copy_rate(device: str) -> float:
    size = 1 << 30 if device == "cuda" else 1 << 27
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP a second of a square product."""
    size = 8192 if device == "cuda" else 1536
    left = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _best(lambda: left @ left, device)


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])

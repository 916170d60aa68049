"""Which implementation of an operation runs: explicit ``impl`` > ``R2EC_IMPL`` > automatic."""

import importlib.util
import os

import torch

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")


def triton_problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``, or None if they can.

    With ``TRITON_INTERPRET=1`` they run on any device, in Triton's interpreter.
    """
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1" or device.type == "cuda":  # "cuda" is ROCm's too
        return None
    return f"its kernels need a CUDA or ROCm device and the tensors are on {device.type!r}"


def resolve(impl: str, device: torch.device, op: str, available: frozenset[str]) -> str:
    """The name of the implementation to run: "triton", "torch" or "reference".

    Args:
        impl: what the caller asked for; "auto" leaves the choice to the environment variable
            ``R2EC_IMPL`` and, where that is unset, to the device (triton on CUDA/ROCm, else torch).
        device: where the tensors are.
        op: the operation's name, for messages.
        available: the implementations this operation has.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the named implementation cannot run here. Nothing falls back silently.
    """
    source = "impl"
    if impl == "auto":
        impl, source = os.environ.get("R2EC_IMPL") or "auto", "R2EC_IMPL"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "auto":
        usable = "triton" in available and device.type == "cuda" and triton_problem(device) is None
        return "triton" if usable else "torch"
    if impl not in available:
        names = ", ".join(sorted(available))
        raise RuntimeError(f"{op}: {source}={impl!r} is not implemented; available: {names}")
    if impl == "triton" and (problem := triton_problem(device)):
        raise RuntimeError(f"{op}: {source}='triton' cannot run: {problem}")
    return impl


def means_triton(device: torch.device) -> bool:
    """Whether "auto" on ``device`` means Triton's kernels; False also where they cannot run."""
    name = os.environ.get("R2EC_IMPL") or "auto"
    wanted = device.type == "cuda" if name == "auto" else name == "triton"
    return wanted and triton_problem(device) is None


def checks_enabled() -> bool:
    """Whether ``R2EC_CHECK=1`` asks for checks of every call's values (NaN, infinity, ids)."""
    return os.environ.get("R2EC_CHECK") == "1"


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

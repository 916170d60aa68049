"""What the device reaches at best: shares of a bandwidth or of a product's rate refer to it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from harness import Case, Entry
from kernel_data import name_of
from options import Options

SUITE = "ceilings"


def entries(options: Options) -> Iterator[Entry]:
    """Copying, reading, and a square product of each type."""
    size, side = (1 << 20, 64) if options.tiny else (1 << 31, 8192)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    shape = {"MiB": size >> 20}
    build = functools.partial(_memory, options.device, size)
    yield Entry(SUITE, "memory", shape, ("copy", "read"), build, section=SUITE)
    names = tuple(name_of(dtype) for dtype in dtypes)
    build = functools.partial(_products, options.device, side, dtypes)
    yield Entry(SUITE, "product", {"n": side}, names, build, section=SUITE)


def _memory(device: str, size: int) -> list[Case]:
    source = torch.ones(size, dtype=torch.int8, device=device)
    target, words = torch.empty_like(source), source.view(torch.int32)
    return [
        Case("copy", lambda: target.copy_(source), lambda _: None, moved=2.0 * size),
        Case("read", words.sum, lambda _: None, moved=float(size)),
    ]


def _products(device: str, side: int, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    made = []
    for dtype in dtypes:
        left = torch.randn(side, side, device=device).to(dtype)
        run = functools.partial(torch.mm, left, left)
        made.append(Case(name_of(dtype), run, lambda _: None, flops=2.0 * side**3))
    return made

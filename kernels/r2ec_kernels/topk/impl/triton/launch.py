"""Launch configurations of the search's scan, by architecture, type and batch. No tuning at import.

``R2EC_AUTOTUNE=1`` times the configurations of the table on first use and remembers the best one
in ``$R2EC_CACHE/launch.json`` (default ``~/.cache/r2ec_kernels``). ``R2EC_SEARCH_WIDE`` names the
kind of scan for many queries.
"""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ...._files import replacing

KINDS = ("tiles", "fused", "cublas")  # ``tiles``, ``wide``, ``product``


@dataclass(frozen=True)
class Launch:
    """block_m queries x block_n items x block_k columns a step; kind: of ``KINDS``."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    kind: str = "tiles"


# Items are the long side of the tile. Narrow tiles read the table once and leave room for several
# programs a multiprocessor. A row's step is 64 to 128 bytes.
_NARROW = {
    1: [Launch(16, 128, 64, 4, 4)],
    2: [Launch(16, 128, 64, 4, 4)],
    4: [Launch(16, 128, 32, 4, 4)],
}
_MIDDLE = {
    1: [Launch(64, 128, 128, 4, 3)],
    2: [Launch(64, 128, 64, 4, 4), Launch(32, 128, 64, 4, 4)],
    4: [Launch(64, 128, 32, 4, 3)],
}
# Where the kernel takes the norms besides, 64 queries of float32 rows are more than registers hold.
_MIDDLE_NORMS = _MIDDLE | {4: [Launch(32, 128, 32, 4, 3)]}
# Many queries feed the tensor cores: two programs a multiprocessor, of which one multiplies while
# the other reduces. Float32 products of the library are not of a known precision.
_CUBLAS = Launch(32, 128, 0, 4, 1, "cublas")
_WIDE = {
    1: [Launch(128, 128, 64, 8, 3, "fused"), _CUBLAS],
    2: [Launch(128, 128, 64, 8, 3, "fused"), _CUBLAS],
    4: [Launch(128, 128, 32, 8, 2, "fused")],
}
# The fused scan takes norms in a launch of its own, which reads the table once more: for two tiles
# of queries that is more than narrower tiles lose.
_WIDE_NORMS = {
    1: [*_WIDE[1]],
    2: [Launch(128, 128, 64, 8, 3), *_WIDE[2]],
    4: [Launch(128, 128, 32, 8, 2), *_WIDE[4]],
}
# Columns of a step where rows are not aligned, by bytes of a number.
_UNALIGNED_STEP = {"tiles": {1: 16, 2: 16, 4: 16}, "fused": {1: 32, 2: 32, 4: 16}}
_NORMS_APART = 256  # queries, above which that launch pays
_INTERPRETED = Launch(16, 64, 32, 1, 1)
_INTERPRETED_WIDE = [Launch(64, 128, 32, 1, 1, "fused"), Launch(32, 128, 0, 1, 1, "cublas")]


def candidates(batch: int, itemsize: int, backend: str, takes_norms: bool = False) -> list[Launch]:
    """Configurations for a batch and an element size in bytes; the first is the default.

    ``backend``: "cuda" or "hip", whose 64 KiB of shared memory hold two stages.
    """
    wide = batch > 64
    if os.environ.get("TRITON_INTERPRET") == "1":
        table = _INTERPRETED_WIDE if wide else [_INTERPRETED]
    elif not wide:
        middle = _MIDDLE_NORMS if takes_norms else _MIDDLE
        table = (_NARROW if batch <= 16 else middle)[itemsize]
    else:
        few = takes_norms and batch <= _NORMS_APART
        table = (_WIDE_NORMS if few else _WIDE)[itemsize]
    named = os.environ.get("R2EC_SEARCH_WIDE")
    if wide and named:
        if named not in KINDS:
            raise ValueError(f"R2EC_SEARCH_WIDE={named}: expected one of {', '.join(KINDS)}")
        table = [launch for launch in table if launch.kind == named] or table
    if backend == "hip":
        return [replace(launch, num_stages=min(2, launch.num_stages)) for launch in table]
    return table


def by_number(config: Launch, itemsize: int) -> Launch:
    """The same for rows that are loaded number by number: registers hold all of a step."""
    step = min(config.block_k, _UNALIGNED_STEP[config.kind][itemsize])
    return replace(config, block_k=step, num_warps=max(8, config.num_warps))


def by_pointers(config: Launch, itemsize: int, *sizes: int) -> Launch:
    """The same for rows loaded by pointers; sizes: a row's, and from row to row, in elements."""
    aligned = all(size % 16 == 0 for size in sizes)
    return config if aligned else by_number(config, itemsize)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a device, whose programs run side by side; Triton's interpreter has one."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose(
    batch: int,
    itemsize: int,
    d: int,
    device: torch.device,
    time: Callable[[Launch], float],
    takes_norms: bool = False,
) -> Launch:
    """The configuration to launch; ``time`` measures one, and is called only when tuning."""
    backend = "hip" if torch.version.hip else "cuda"
    options = candidates(batch, itemsize, backend, takes_norms)
    if os.environ.get("R2EC_AUTOTUNE") != "1" or len(options) == 1:
        return options[0]
    path = Path(os.environ.get("R2EC_CACHE", "~/.cache/r2ec_kernels")).expanduser() / "launch.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    # the next powers of two; "scan": older files keep other configurations under other keys
    classes = (1 << (size - 1).bit_length() for size in (min(batch, 1024), d))
    key = "/".join(map(str, (torch.cuda.get_device_name(device), "scan", itemsize, *classes)))
    key += "/norms" if takes_norms else ""
    key += "" if len({launch.kind for launch in options}) > 1 else f"/{options[0].kind}"
    if key not in stored:
        stored[key] = asdict(min(options, key=time))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Path(temporary).write_text(json.dumps(stored, indent=1))
    return Launch(**stored[key])

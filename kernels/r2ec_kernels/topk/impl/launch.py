"""Launch configurations of the search kernel, by architecture, type and batch. No tuning at import.

``R2EC_AUTOTUNE=1`` times the configurations of the table on first use and remembers the best one
in ``$R2EC_CACHE/launch.json`` (default ``~/.cache/r2ec_kernels``).
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..._files import replacing


@dataclass(frozen=True)
class Launch:
    """block_m queries x block_n items x block_k columns a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Items are the long side of the tile. Narrow tiles read the table once and leave room for several
# programs a multiprocessor; wide ones feed the tensor cores. A row's step is 64 to 128 bytes.
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
_WIDE = {
    1: [Launch(128, 128, 64, 8, 3)],
    2: [Launch(128, 128, 64, 8, 3), Launch(128, 128, 32, 8, 4)],
    4: [Launch(128, 128, 32, 8, 2)],
}
# Where the kernel takes the norms besides, 64 queries of float32 rows are more than registers hold.
_MIDDLE_NORMS = _MIDDLE | {4: [Launch(32, 128, 32, 4, 3)]}
_INTERPRETED = Launch(16, 64, 32, 1, 1)


def candidates(batch: int, itemsize: int, backend: str, takes_norms: bool = False) -> list[Launch]:
    """Configurations for a batch and an element size in bytes; the first is the default.

    ``backend``: "cuda" or "hip", whose 64 KiB of shared memory hold two stages.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [_INTERPRETED]
    middle = _MIDDLE_NORMS if takes_norms else _MIDDLE
    table = _NARROW if batch <= 16 else middle if batch <= 64 else _WIDE
    if backend == "hip":
        return [replace(launch, num_stages=2) for launch in table[itemsize]]
    return table[itemsize]


def choose(
    batch: int,
    itemsize: int,
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
    # "queries x items": older files keep the sides of a tile the other way round, under other keys
    key = f"{torch.cuda.get_device_name(device)}/{min(batch, 65)}/{itemsize}/queries x items"
    key += "/norms" if takes_norms else ""
    if key not in stored:
        stored[key] = asdict(min(options, key=time))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Path(temporary).write_text(json.dumps(stored, indent=1))
    return Launch(**stored[key])

"""Products whose rows do not depend on one another, on CPUs.

Intel's matrix library rounds a row of a product by how many rows there are and by how many threads
share it, unless its strict reproducibility is asked for before it is first used. With it, and never
fewer than 16 rows (`model.hf_compat.FEW_ROWS`), a row's numbers are its own. It costs nothing that
could be measured.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from r2ec_fast.model.prefix_cache import KnownPrefix
    from r2ec_fast.model.r2ec import R2ecModel
    from r2ec_fast.packing.ragged import Ragged

VARIABLE = "MKL_CBWR"


def strict_products() -> dict[str, str]:
    """Environment variables that ask for it on this CPU; none where it is not known how."""
    if VARIABLE in os.environ:
        return {}
    import torch

    found = {"AVX512": "AVX512,STRICT", "AVX2": "AVX2,STRICT"}
    kind = torch.backends.cpu.get_cpu_capability()
    return {VARIABLE: found[kind]} if kind in found else {}


def ask_for_strict_products() -> None:
    """Set what :func:`strict_products` says; call it before the first product."""
    os.environ.update(strict_products())


def invariant(model: R2ecModel, prompts: Ragged, prefix: KnownPrefix | None) -> bool:
    """Whether a prompt's state is the same, bit for bit, alone and beside others, as far as these
    prompts show."""
    together = model.encode_rows(prompts, prefix=prefix)
    for size in (1, 2, 3):
        for start in range(0, len(prompts), size):
            part = np.arange(start, min(start + size, len(prompts)))
            if not model.encode_rows(prompts.select(part), prefix=prefix).equal(together[part]):
                return False
    return True

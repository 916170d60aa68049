"""Products whose rows do not depend on one another, on CPUs.

Intel's matrix library rounds a row of a product by how many rows there are and by how many threads
share it, unless its strict reproducibility is asked for before it is first used. With it, and never
fewer than 16 rows (`model.hf_compat.FEW_ROWS`), a row's numbers are its own. It costs nothing that
could be measured.
"""

from __future__ import annotations

import os

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

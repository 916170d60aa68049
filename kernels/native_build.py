"""How the C++ extension of r2ec_kernels is built: for the setup.py of both packages that have it.

Neither torch nor anything but pybind11 and a C++17 compiler takes part.
"""

import os
import sys
from pathlib import Path

OPTIMISE = ["-O3", "-Wall", "-Wextra"]


def wanted() -> bool:
    """False where R2EC_BUILD_EXTENSION=0 asks for a package without C++; else readies parallel
    builds."""
    switch = os.environ.get("R2EC_BUILD_EXTENSION", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"R2EC_BUILD_EXTENSION must be 0 or 1, got {switch!r}")
    if switch == "1":
        from pybind11.setup_helpers import ParallelCompile

        ParallelCompile("R2EC_BUILD_JOBS", default=0).install()  # 0: one a core
    return switch == "1"


def sources(folder: str, ending: str) -> list[str]:
    """Files of a folder and of those in it, relative as setuptools wants them, in one order."""
    return sorted(str(path) for path in Path(folder).rglob(f"*.{ending}"))


def extension(folder: str):
    """r2ec_kernels._cpu._native from the sources in ``folder``."""
    from pybind11.setup_helpers import Pybind11Extension

    parallel = ["-fopenmp"] if sys.platform == "linux" else []
    return Pybind11Extension(
        "r2ec_kernels._cpu._native",
        sources(folder, "cpp"),
        depends=sources(folder, "hpp"),
        include_dirs=[folder],
        cxx_std=17,
        extra_compile_args=[
            *OPTIMISE,
            *parallel,
            "-Wno-uninitialized",  # gcc's own header of AVX-512
            "-Wno-maybe-uninitialized",
            "-ffp-contract=off",  # canonical scores round every operation
        ],
        extra_link_args=parallel,
    )

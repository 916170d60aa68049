"""Builds the C++ extensions r2ec_fast._packing and r2ec_kernels._first_pass;
R2EC_BUILD_EXTENSION=0 installs without them.

Neither torch nor anything but pybind11 and a C++17 compiler takes part. A failing build fails the
installation: without the extensions everything still works, packing and search on a CPU many times
slower, and that is a choice to make, not an accident.
"""

import os
import sys
from glob import glob

from setuptools import setup


def extensions() -> list:
    switch = os.environ.get("R2EC_BUILD_EXTENSION", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"R2EC_BUILD_EXTENSION must be 0 or 1, got {switch!r}")
    if switch == "0":
        return []
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension

    ParallelCompile("R2EC_BUILD_JOBS", default=0).install()  # 0: one a core
    optimise = ["-O3", "-Wall", "-Wextra"]
    parallel = ["-fopenmp"] if sys.platform == "linux" else []
    return [
        Pybind11Extension(
            "r2ec_fast._packing",
            sorted(glob("csrc/*.cpp")),
            depends=glob("csrc/*.hpp"),
            cxx_std=17,
            extra_compile_args=optimise,
        ),
        Pybind11Extension(
            "r2ec_kernels._first_pass",
            sorted(glob("kernels/csrc/*.cpp")),
            depends=glob("kernels/csrc/*.hpp"),
            cxx_std=17,
            # gcc's own header of AVX-512 begins with variables that it then reports
            extra_compile_args=[
                *optimise,
                *parallel,
                "-Wno-uninitialized",
                "-Wno-maybe-uninitialized",
                "-ffp-contract=off",  # canonical scores round every operation
            ],
            extra_link_args=parallel,
        ),
    ]


setup(ext_modules=extensions())

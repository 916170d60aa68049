"""Builds the stand-alone package r2ec-kernels and its C++ extension, which R2EC_BUILD_EXTENSION=0
leaves out.

The root's setup.py builds the same extension into r2ec-fast.
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
    parallel = ["-fopenmp"] if sys.platform == "linux" else []
    return [
        Pybind11Extension(
            "r2ec_kernels._first_pass",
            sorted(glob("csrc/*.cpp")),
            depends=glob("csrc/*.hpp"),
            cxx_std=17,
            # gcc's own header of AVX-512 begins with variables that it then reports
            extra_compile_args=[
                "-O3",
                "-Wall",
                "-Wextra",
                *parallel,
                "-Wno-uninitialized",
                "-Wno-maybe-uninitialized",
                "-ffp-contract=off",  # canonical scores round every operation
            ],
            extra_link_args=parallel,
        )
    ]


setup(ext_modules=extensions())

"""Builds the C++ extension r2ec_fast._packing; R2EC_BUILD_EXTENSION=0 installs without it.

Neither torch nor anything but pybind11 and a C++17 compiler takes part. A failing build fails the
installation: without the extension packing still works, many times slower, and that is a choice to
make, not an accident.
"""

import os

from setuptools import setup


def extensions() -> list:
    switch = os.environ.get("R2EC_BUILD_EXTENSION", "1")
    if switch not in ("0", "1"):
        raise ValueError(f"R2EC_BUILD_EXTENSION must be 0 or 1, got {switch!r}")
    if switch == "0":
        return []
    from pybind11.setup_helpers import Pybind11Extension

    return [
        Pybind11Extension(
            "r2ec_fast._packing",
            ["csrc/assembler.cpp", "csrc/bindings.cpp", "csrc/packer.cpp"],
            depends=["csrc/assembler.hpp", "csrc/packer.hpp", "csrc/parallel.hpp"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ]


setup(ext_modules=extensions())

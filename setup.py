"""Builds the C++ extensions r2ec_fast._packing and r2ec_kernels._cpu._native;
R2EC_BUILD_EXTENSION=0 installs without them.

Neither torch nor anything but pybind11 and a C++17 compiler takes part. A failing build fails the
installation: without the extensions everything still works, packing and search on a CPU many times
slower, and that is a choice to make, not an accident.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
import native_build  # noqa: E402


def extensions() -> list:
    if not native_build.wanted():
        return []
    from pybind11.setup_helpers import Pybind11Extension

    packing = Pybind11Extension(
        "r2ec_fast._packing",
        native_build.sources("csrc", "cpp"),
        depends=native_build.sources("csrc", "hpp"),
        cxx_std=17,
        extra_compile_args=native_build.OPTIMISE,
    )
    return [packing, native_build.extension("kernels/csrc")]


setup(ext_modules=extensions())

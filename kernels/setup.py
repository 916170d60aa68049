"""Builds the stand-alone package r2ec-kernels; R2EC_BUILD_EXTENSION=0 leaves out its extension."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))
import native_build  # noqa: E402

setup(ext_modules=[native_build.extension("csrc")] if native_build.wanted() else [])

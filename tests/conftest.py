"""Hooks of all tests: what the mark gpu needs, and Triton's interpreter."""

import pytest
from _support import few_packages, interpreter


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(interpreter, "r2ec_interpreter")
    config.pluginmanager.register(few_packages, "r2ec_few_packages")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():  # "cuda" is ROCm's name too
            pytest.skip("needs a CUDA or ROCm device; torch finds none")

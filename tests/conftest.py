"""Hooks of all tests: what the mark gpu needs, and Triton's interpreter."""

import re

import pytest
from _support import interpreter


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(interpreter, "r2ec_interpreter")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> pytest.CollectReport:
    """With -m gpu, files that need a package which is not installed are skipped: a machine with a
    GPU may have what the kernels need and no more."""
    report = yield
    if report.failed and collector.config.option.markexpr == "gpu":
        missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr))
        if missing and missing[1] not in ("r2ec_fast", "r2ec_kernels", "_support"):
            reason = f"Skipped: {missing[1]} is not installed"
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, reason)
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():  # "cuda" is ROCm's name too
            pytest.skip("needs a CUDA or ROCm device; torch finds none")

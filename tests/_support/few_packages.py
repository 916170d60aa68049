"""Tests where few packages are installed: a plugin of pytest.

A machine with a GPU may have what the kernels need and no more. With -m gpu, files that import
another package are skipped, and so are folders whose conftest.py does: for those pytest asks no
hook of a conftest.py above them, but that of a plugin.
"""

from __future__ import annotations

import re

import pytest

OURS = ("r2ec_fast", "r2ec_kernels", "_support")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): no limit without pytest-timeout")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> pytest.CollectReport:
    report = yield
    if report.failed and collector.config.option.markexpr == "gpu":
        missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr))
        if missing and missing[1] not in OURS:
            reason = f"Skipped: {missing[1]} is not installed"
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, reason)
    return report

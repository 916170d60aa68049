"""Where the real data sets are, and small files written by tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real data sets, from R2EC_TEST_DATA."""
    place = os.environ.get("R2EC_TEST_DATA")
    if not place:
        pytest.skip("R2EC_TEST_DATA is not set (a directory of data sets, docs/guides/data.md)")
    return Path(place)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """write(name, content) -> path of a new file in the test's directory."""

    def _write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


@pytest.fixture(scope="session")
def generate_amazon() -> Callable[..., tuple[Path, Path]]:
    """The generator of raw files in Amazon's schema."""
    path = Path(__file__).parents[2] / "benchmarks" / "generate_amazon.py"
    spec = importlib.util.spec_from_file_location("generate_amazon", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.generate

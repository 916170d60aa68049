"""The Triton search in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("similarity", ["dot", "cosine", "l2"])
def test_interpreted_kernels_equal_the_reference(similarity):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_check.py"), similarity],
        env={**os.environ, "TRITON_INTERPRET": "1", "R2EC_IMPL": "triton"},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases 60" in done.stdout


def test_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import r2ec_kernels, torch; " + (
        "q = torch.eye(3); print(r2ec_kernels.item_topk(q, q, 1).indices.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[0], [1], [2]]"

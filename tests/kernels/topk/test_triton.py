"""The Triton search in Triton's interpreter, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from _support.interpreted import run_interpreted


@pytest.mark.parametrize("similarity", ["dot", "cosine", "l2"])
def test_interpreted_kernels_equal_the_reference(similarity, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("R2EC_IMPL", "triton")
    check = Path(__file__).with_name("triton_check.py")
    assert "cases 60" in run_interpreted(check, similarity)


def test_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import r2ec_kernels, torch; " + (
        "q = torch.eye(3); print(r2ec_kernels.item_topk(q, q, 1).indices.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[0], [1], [2]]"

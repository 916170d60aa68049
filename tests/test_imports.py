"""What an import needs and what it must not disturb, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
USE_KERNELS = """
import torch, r2ec_kernels as k
q, items = torch.randn(2, 8), torch.randn(30, 8)
assert k.item_topk(q, items, 3).indices.shape == (2, 3)
assert k.ItemIndex(items).search(q, 3).indices.shape == (2, 3)
assert k.linear_logprob(q, items, torch.tensor([1, 2])).log_prob.shape == (2,)
assert "transformers" not in sys.modules and "triton" not in sys.modules
"""


def run(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_need_neither_transformers_nor_triton():
    run(BLOCKER.format(blocked={"transformers", "triton", "r2ec_fast"}) + USE_KERNELS)


@pytest.mark.parametrize("package", ["r2ec_fast", "r2ec_kernels"])
def test_import_is_cheap(package):
    loaded = run(f"import sys, {package}; print(*sys.modules)").split()
    heavy = {"transformers", "peft", "accelerate", "polars", "scipy", "matplotlib", "vllm", "trl"}
    assert not heavy & set(loaded)
    if package == "r2ec_fast":
        assert "torch" not in loaded


def test_transformers_imports_from_the_repository_root():
    # a folder called kernels must not be taken for Hugging Face's package of that name
    run("import transformers; from transformers import LlamaForCausalLM")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_hugging_face_kernels_wins_where_it_is_installed(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("origin = 'installed'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels, r2ec_kernels\n"
    assert run(code + "print(kernels.origin)").strip() == "installed"


def test_every_public_name_exists():
    run("import r2ec_fast\nfor name in r2ec_fast.__all__: getattr(r2ec_fast, name)")
    run("import r2ec_kernels\nfor name in r2ec_kernels.__all__: getattr(r2ec_kernels, name)")
    out = run("import r2ec_fast\ntry: r2ec_fast.nothing\nexcept AttributeError as e: print(e)")
    assert "nothing" in out

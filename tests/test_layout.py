"""The layout that docs/architecture.md describes, read from the files."""

import importlib
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import r2ec_fast
import r2ec_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"r2ec_fast": ROOT / "r2ec_fast", "r2ec_kernels": ROOT / "kernels" / "r2ec_kernels"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# folders of tests that follow something else than a package
OTHERS = {"_support", "benchmarks", "csrc", "kernels", "peers"}
PRIVATE = {"cpu": "_cpu", "exact": "_exact"}  # tests/kernels/cpu tests r2ec_kernels._cpu


def modules(package: str) -> list[str]:
    """Names below the package, "data.store"."""
    folder = PACKAGES[package]
    paths = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


def public(package: str) -> list[str]:
    return importlib.import_module(package).__all__


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_is_in_a_layer(package):
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    [layers] = [c["layers"] for c in contracts if c.get("containers") == [package]]
    named = {name.strip() for layer in layers for name in layer.split("|")}
    present = {name.split(".")[0] for name in modules(package)} - {"__init__"}
    assert present == named


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_named_like_a_public_function(package):
    """Importing such a module would replace the function in its package."""
    functions = {name for package in PACKAGES for name in public(package) if name.islower()}
    parts = {part for name in modules(package) for part in name.split(".")}
    assert functions and not functions & parts


def test_one_version():
    """Both distributions and both packages take it from one file."""
    for name in ("pyproject.toml", "kernels/pyproject.toml"):
        found = tomllib.loads((ROOT / name).read_text())
        assert found["project"]["dynamic"] == ["version"], name
        dynamic = found["tool"]["setuptools"]["dynamic"]
        assert dynamic["version"] == {"attr": "r2ec_kernels._version.__version__"}, name
    assert r2ec_fast.__version__ == r2ec_kernels.__version__ == metadata.version("r2ec-fast")
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{r2ec_fast.__version__}]" in changes


def test_every_test_folder_follows_a_package():
    for parent, package in (("", "r2ec_fast"), ("kernels", "r2ec_kernels")):
        for folder in sorted((ROOT / "tests" / parent).iterdir()):
            if not folder.is_dir() or folder.name.startswith("__") or folder.name in OTHERS:
                continue
            name = PRIVATE.get(folder.name, folder.name) if parent else folder.name
            assert (PACKAGES[package] / name).is_dir(), folder


def test_every_triton_kernel_has_tests_for_both_devices():
    """Those of the interpreter and of a GPU: tests/_support/interpreter.py."""
    for path in PACKAGES["r2ec_kernels"].rglob("triton.py"):
        op = path.relative_to(PACKAGES["r2ec_kernels"]).parts[0]
        files = list((ROOT / "tests" / "kernels" / op).glob("test_*_triton.py"))
        assert files and all("device" in file.read_text() for file in files), op


def test_every_mark_is_used_and_documented():
    table = (ROOT / "CONTRIBUTING.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]:
        name = line.split(":")[0]
        assert f"| `{name}` |" in table and f"mark.{name}" in sources, name


def test_the_reference_pages_list_every_public_name():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)$", pages, flags=re.M))
    for package in PACKAGES:
        assert {f"{package}.{name}" for name in public(package)} <= listed


def test_every_op_with_kernels_is_in_the_compile_table():
    from r2ec_kernels.aot import OPS

    found = [*PACKAGES["r2ec_kernels"].glob("*/impl/triton.py")]
    found += PACKAGES["r2ec_kernels"].glob("*/impl/triton")
    kernels = {path.parents[1].name for path in found}
    assert kernels == set(OPS)

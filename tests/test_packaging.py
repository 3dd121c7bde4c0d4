"""What is shipped, what importing it costs, and which way imports point."""

from __future__ import annotations

import importlib
import importlib.metadata
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools  # type: ignore[import-untyped]

import l2l_fast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_arguments() -> dict[str, Any]:
    """What setup.py hands to setuptools, without building anything."""
    arguments: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", arguments.update)
        patch.chdir(ROOT)
        patch.delenv("L2L_FAST_NO_EXT", raising=False)
        runpy.run_path(str(ROOT / "setup.py"))
        patch.setenv("L2L_FAST_NO_EXT", "1")
        without: dict[str, Any] = {}
        patch.setattr(setuptools, "setup", without.update)
        runpy.run_path(str(ROOT / "setup.py"))
    assert without == {name: arguments[name] for name in ("packages", "package_dir")}
    return arguments


def test_every_package_is_shipped(setup_arguments: dict[str, Any]) -> None:
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "l2l_fast").rglob("__init__.py")]
    expected = {".".join(folder.parts) for folder in folders} | {"l2l_fast.kernels"}
    assert sorted(setup_arguments["packages"]) == sorted(expected)
    assert setup_arguments["package_dir"] == {"l2l_fast.kernels": "kernels"}
    assert not (ROOT / "l2l_fast" / "kernels").exists()


def test_every_data_file_is_shipped() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["l2l_fast"]
    shipped = {path for pattern in data for path in (ROOT / "l2l_fast").glob(pattern)}
    kinds = (".json", ".safetensors", ".pyi", ".typed")
    assert shipped == {
        path for path in (ROOT / "l2l_fast").rglob("*") if path.suffix in kinds or path.name == "py.typed"
    }


def test_every_source_is_built(setup_arguments: dict[str, Any]) -> None:
    (extension,) = setup_arguments["ext_modules"]
    assert extension.name == "l2l_fast._C"
    built = {Path(source).name for source in extension.sources}
    built |= {Path(source).name for _, library in setup_arguments["libraries"] for source in library["sources"]}
    on_disk = {path.name for path in (ROOT / "csrc").glob("*.cpp")}
    assert built <= on_disk
    # Kernels of instruction sets that this architecture lacks stay behind, nothing else does.
    assert all(name.startswith("kernels_") for name in on_disk - built)


def test_flags_neither_assume_this_processor_nor_loosen_arithmetic() -> None:
    source = (ROOT / "setup.py").read_text()
    for flag in ("-march=native", "-mcpu=native", "-mtune=native", "-ffast-math", "-Ofast", "-funsafe-math"):
        assert flag not in source


def test_source_distribution_has_what_the_build_reads() -> None:
    lines = (ROOT / "MANIFEST.in").read_text().split("\n")
    assert "graft csrc" in lines
    assert "graft kernels" in lines


def test_version_is_stated_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert l2l_fast.__version__ == project["version"] == importlib.metadata.version("l2l_fast")


def test_kernels_are_no_package_of_their_own() -> None:
    code = "import sys; sys.path.insert(0, '.'); import kernels; import kernels.launch"
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "No module named 'kernels.launch'" in result.stderr


def test_transformers_may_look_for_kernels_of_its_own() -> None:
    """It imports whatever is called so, and goes without if that has no version."""
    code = """
import sys
sys.path.insert(0, '.')
from transformers import Trainer
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_kernels_are_importable_under_their_name() -> None:
    assert importlib.import_module("l2l_fast.kernels").__name__ == "l2l_fast.kernels"


def test_import_is_light() -> None:
    """The library neither loads a compiled kernel before it is needed nor what only the command line uses."""
    heavy = [
        "triton",
        "l2l_fast._C",
        "l2l_fast.kernels",
        "typer",
        "rich",
        "matplotlib",
        "optuna",
        "sklearn",
        "tensorboard",
        "l2l_fast.cli",
    ]
    code = f"import sys, l2l_fast; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_imports_point_one_way() -> None:
    script = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([str(script), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kept, 0 broken" in result.stdout

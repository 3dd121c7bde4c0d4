"""The examples and the migration guide run as they are written; checkpoints of frameworks carry the optimizer."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_in_frameworks import FRAMEWORKS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
GUIDE = ROOT / "docs" / "migration.md"


def last_line(folder: Path, script: Path, *arguments: str) -> str:
    """What ``script`` prints at the end, run in ``folder``."""
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_checkpoint_of_a_framework_resumes_to_the_bit(framework: str, tmp_path: Path) -> None:
    assert last_line(tmp_path, ROOT / "tests" / "resume_in_frameworks.py", framework) == "0.0"


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str, tmp_path: Path) -> None:
    line = last_line(tmp_path, EXAMPLES / name)
    fell = re.fullmatch(r"the loss fell from (\S+) to (\S+) in 100 steps", line)
    assert fell, line
    before, after = map(float, fell.groups())
    assert after < before / 2
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


@pytest.mark.parametrize("name", NAMES)
def test_example_says_how_to_run_it(name: str) -> None:
    documentation = ast.get_docstring(ast.parse((EXAMPLES / name).read_text()))
    assert documentation
    stated = re.search(rf": python docs/examples/{re.escape(name)} \(extras?: ([a-z, ]+)\)\.$", documentation, re.M)
    assert stated, documentation
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(stated[1].split(", ")) <= extras.keys()
    assert f"examples/{name}" in GUIDE.read_text(), "the guide names every example"


def test_migration_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code blocks one after the other, as one program."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    assert {language for language, _ in blocks} == {"python"}
    names: dict[str, Any] = {}
    for number, (_, code) in enumerate(blocks):
        exec(compile(code, f"{GUIDE.name}, block {number}", "exec"), names)
        if number == 0:
            assert names["loss_of"](names["model"]).item() < names["first_loss"] / 2
    assert names["optimizer"].state_dict()["state"], "the last block has loaded a checkpoint"

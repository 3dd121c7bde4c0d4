"""Safetensors files: written whole or not at all, read with clear errors."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from l2l_fast import files
from l2l_fast.files import load_tensors, save_atomically

TENSORS = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "empty": torch.zeros(0, 4)}
METADATA = {"format": "test.v1", "note": "ünïcode"}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_atomically(TENSORS, METADATA, path)
    tensors, metadata = load_tensors(path, "test.v1")
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_replaces_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    save_atomically(TENSORS, METADATA, os.fspath(path))
    assert load_tensors(os.fspath(path), "test.v1")[1] == METADATA


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("stage", ["save_file", "os.fsync"])
def test_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(f"l2l_fast.files.{stage}", fail)
    with pytest.raises(type(error)):
        save_atomically(TENSORS, METADATA, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_appears_only_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    save_file = safetensors.torch.save_file

    def watched(*arguments: Any, **options: Any) -> None:
        save_file(*arguments, **options)
        assert not path.exists()

    monkeypatch.setattr(files, "save_file", watched)
    save_atomically(TENSORS, METADATA, path)
    assert path.exists()


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:  # permissions do not stop a superuser, so the system's answer is played
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("l2l_fast.files.tempfile.mkstemp", refuse)
    with pytest.raises(PermissionError, match=r"can't write .*file: Permission denied"):
        save_atomically(TENSORS, METADATA, tmp_path / "file")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        save_atomically(TENSORS, METADATA, tmp_path / "nowhere" / "file")


def test_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        save_atomically(TENSORS, METADATA, tmp_path / "file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_tensors(tmp_path / "file", "test.v1")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"not a safetensors file", b"\xff" * 64])
def test_other_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_tensors(path, "test.v1")

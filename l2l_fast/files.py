"""Files written atomically, and safetensors files read with clear errors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file to write, in the same folder, that becomes ``path`` if nothing is raised.

    Raises:
        OSError: if the folder does not exist or can't be written; an existing file is left as it is.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"can't write {target}: the folder {target.parent} does not exist")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OSError(error.errno, f"can't write {target}: {error.strerror}") from error
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_atomically(tensors: dict[str, Tensor], metadata: dict[str, str], path: str | os.PathLike[str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError: as :func:`replacing` does.
    """
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_tensors(path: str | os.PathLike[str], expected_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a safetensors file or its metadata names another format.
    """
    source = os.fspath(path)
    if not os.path.isfile(source):
        raise FileNotFoundError(f"there is no file {source}")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise ValueError(f"{source} is not a complete safetensors file ({error}); save it again") from error
    if metadata.get("format") != expected_format:
        raise ValueError(f"{source} has the format {metadata.get('format', 'unknown')!r}, expected {expected_format!r}")
    return tensors, metadata

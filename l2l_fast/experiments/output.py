"""Files that an experiment writes: whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from l2l_fast.files import replacing


def prepare_folder(path: str | os.PathLike[str]) -> Path:
    """The folder ``path``, made if needed and tried for writing, before any work is done for it.

    Raises:
        OSError: if it can't be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"can't write to the output folder {folder}: {error.strerror or error}; name another one"
        ) from error
    return folder


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: if it can't be written; an existing file is left as it is.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _without_nonfinite(value: Any) -> Any:
    """``value`` with numbers that JSON can't express as ``None``."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(entry) for entry in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically; infinities and NaN become ``null``."""
    write_bytes(path, (json.dumps(_without_nonfinite(value), indent=2, allow_nan=False) + "\n").encode())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as CSV, atomically."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes(path, buffer.getvalue().encode())

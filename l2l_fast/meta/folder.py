"""The files of one training."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from l2l_fast.files import replacing
from l2l_fast.meta.lock import hold
from l2l_fast.meta.log import LogRow

CHECKPOINT, BEST, LOG, SUMMARY = "checkpoint.safetensors", "best.safetensors", "log.csv", "summary.json"

_NAMES = (CHECKPOINT, BEST, LOG, SUMMARY)


class TrainingFolder:
    """Where a training keeps its files; each of them is written whole or not at all.

    Args:
        path: the folder; made by :meth:`held`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / CHECKPOINT
        self.best = self.path / BEST

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep other trainings out of it.

        Raises:
            BlockingIOError: if another training is at work in it.
            OSError: if it can't be made or written.
        """
        _make_writable(self.path)
        with hold(self.path):
            for name in _NAMES:
                for part in self.path.glob(f".{name}.*"):  # left by a process that was killed while it wrote
                    part.unlink()
            yield

    def check_unused(self) -> None:
        """Make sure that nothing is written over.

        Raises:
            FileExistsError: if there are files of an earlier training.
        """
        found = [name for name in _NAMES if (self.path / name).exists()]
        if found:
            raise FileExistsError(
                f"{self.path} holds {', '.join(found)} of an earlier training; fit(resume=True) carries on with it, "
                "another folder starts anew"
            )

    def write_log(self, rows: Iterable[LogRow]) -> None:
        """Write the log, in place of the one there is."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow([field.name for field in fields(LogRow)])
        writer.writerows(astuple(row) for row in rows)
        self._write(LOG, text.getvalue())

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write(SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        with replacing(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")


def _make_writable(folder: Path) -> None:
    """Make the folder and try it, so that training does not find out after its first validation."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"can't write to the folder {folder}: {error.strerror or error}; name another one") from error

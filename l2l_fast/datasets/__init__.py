"""Data sets of images to train on, read from disk and fetched once where they are missing."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from l2l_fast.datasets import digits, mnist
from l2l_fast.datasets.dataset import Dataset as Dataset

DATASETS: dict[str, Callable[[Path], Dataset]] = {"mnist": mnist.load, "digits": digits.load}


FOLDER_VARIABLE = "L2L_FAST_DATA"


def load(name: str, folder: str | os.PathLike[str] | None = None) -> Dataset:
    """A data set by name; the same object whenever a process asks for it again, so change nothing in it.

    Args:
        name: ``"mnist"``, which is downloaded if ``folder`` lacks it, or ``"digits"``, which comes with scikit-learn.
        folder: where the files lie; ``None`` takes the environment variable ``L2L_FAST_DATA``, or where that is not
            set the folder ``l2l_fast`` in the user's cache.

    Raises:
        ValueError: if there is no such data set, or a file of it is damaged.
        ConnectionError: if it is neither in the folder nor can be downloaded.
        OSError: if the folder can't be read or written.
        ImportError: if it comes with a package that is not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known data sets: {', '.join(map(repr, DATASETS))}")
    return _load(name, (_default_folder() if folder is None else Path(folder)).expanduser().resolve())


@functools.cache
def _load(name: str, folder: Path) -> Dataset:
    return DATASETS[name](folder)


def _default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(cache, "l2l_fast"))

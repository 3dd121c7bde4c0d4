"""MNIST: handwritten digits, 28 x 28 pixels each."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from l2l_fast.datasets.dataset import Dataset
from l2l_fast.datasets.download import download
from l2l_fast.datasets.idx import damaged, read_idx

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
CLASSES = 10
IMAGE_SHAPE = (28, 28)


def load(folder: Path) -> Dataset:
    """60000 training and 10000 test images, values 0 to 255, from the four IDX files, compressed by gzip or not.

    They are looked for in ``folder``, ``folder/mnist`` and ``folder/MNIST/raw``; a missing one is downloaded to the
    last of these.

    Raises:
        ValueError: if a file is damaged.
        ConnectionError: if one is neither there nor can be downloaded.
        OSError: if the folder can't be read or written.

    Source: LeCun, Bottou, Bengio and Haffner 1998, Gradient-based learning applied to document recognition.
    """
    return Dataset("mnist", *_split(folder, "train"), *_split(folder, "t10k"), classes=CLASSES, largest=255)


def _split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    images_path = _file(folder, f"{split}-images-idx3-ubyte.gz")
    labels_path = _file(folder, f"{split}-labels-idx1-ubyte.gz")
    images = read_idx(images_path, IMAGE_SHAPE)
    labels = read_idx(labels_path, ()).long()
    if len(labels) != len(images):
        raise damaged(labels_path, f"{len(labels)} labels", f"{len(images)} for the images of {images_path}")
    if labels.max() >= CLASSES:
        raise damaged(labels_path, f"the label {labels.max()}", f"labels from 0 to {CLASSES - 1}")
    return images, labels


def _file(folder: Path, name: str) -> Path:
    """Where the file ``name`` is, under that name or a usual variant; downloaded if need be."""
    plain = name.removesuffix(".gz")
    dotted = plain.replace("-idx", ".idx")
    places = (folder, folder / "mnist", folder / "MNIST" / "raw")
    for place in places:
        present = _names(place)
        for variant in (plain, name, dotted, f"{dotted}.gz"):
            if variant in present:
                return place / variant
    target = places[-1] / name
    try:
        download([mirror + name for mirror in MIRRORS], target, SHA256[name])
    except OSError as error:
        message = (
            f"the data set 'mnist' lacks {name}: it is not in {', '.join(map(str, places))}, and the download failed "
            f"({error}); put {', '.join(SHA256)} into a folder and name that with --data-dir or L2L_FAST_DATA"
        )
        if isinstance(error, ConnectionError):
            raise ConnectionError(message) from error
        raise OSError(error.errno, message) from error
    return target


def _names(folder: Path) -> set[str]:
    """What lies in a folder; nothing if there is no such folder."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise OSError(
            error.errno,
            f"can't read {folder}: {error.strerror}; name another folder with --data-dir or L2L_FAST_DATA",
        ) from error

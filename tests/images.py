"""A data set of a few random images, in the files that MNIST comes in."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor


def _idx(values: Tensor) -> bytes:
    """``values``, uint8, as an IDX file has them."""
    return bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape) + values.numpy().tobytes()


def write_mnist(folder: Path, *, train: int = 12, test: int = 5) -> None:
    """So many random images of 28 x 28 pixels, with random labels; ``L2L_FAST_DATA`` may then name ``folder``."""
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(_idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(_idx(labels))

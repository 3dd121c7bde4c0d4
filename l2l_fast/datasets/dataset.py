"""What every data set looks like."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, on the CPU, in a training and a test split.

    Attributes:
        name: what it is loaded by.
        train_images: ``[n, height, width]``, uint8.
        train_labels: ``[n]``, int64, from 0 to ``classes - 1``.
        test_images: as ``train_images``, with a count of its own.
        test_labels: as ``train_labels``.
        classes: how many classes there are.
        largest: greatest value of a pixel: images divided by it lie in [0, 1].
    """

    name: str
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    classes: int
    largest: int

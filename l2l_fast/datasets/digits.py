"""The handwritten digits that come with scikit-learn, 8 x 8 pixels each."""

from __future__ import annotations

from pathlib import Path

import torch

from l2l_fast.datasets.dataset import Dataset

CLASSES = 10
TEST_IMAGES_PER_CLASS = 30


def load(folder: Path) -> Dataset:
    """1497 training and 300 test images, values 0 to 16; they come with scikit-learn, so ``folder`` is not used.

    The last 30 images of every class are the test split. Writers follow each other in the data, so most of it is by
    hands that the training split lacks (a nearest neighbour is right on 95 % of it, on 98 % of a random split).

    Raises:
        ImportError: if scikit-learn is not installed.

    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI machine learning repository.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the data set 'digits' comes with scikit-learn, which is not installed; pip install 'l2l_fast[cli]'"
        ) from error
    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.uint8)
    labels = torch.from_numpy(data.target).long()
    test = torch.zeros_like(labels, dtype=torch.bool)
    for label in range(CLASSES):
        test[(labels == label).nonzero()[-TEST_IMAGES_PER_CLASS:]] = True
    return Dataset("digits", images[~test], labels[~test], images[test], labels[test], classes=CLASSES, largest=16)

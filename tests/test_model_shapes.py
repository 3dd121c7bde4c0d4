"""The models of the benchmarks are those they are named after."""

from __future__ import annotations

import math

import pytest
from shapes import MODELS


@pytest.mark.parametrize(
    ("model", "tensors", "coordinates"),
    [("ResNet-50", 161, 25_557_032), ("ViT-B/16", 152, 86_567_656), ("GPT-2 124M", 148, 124_439_808)],
)
def test_tensors_and_coordinates(model: str, tensors: int, coordinates: int) -> None:
    """As published with the weights of each."""
    assert len(MODELS[model]) == tensors
    assert sum(math.prod(shape) for shape in MODELS[model]) == coordinates

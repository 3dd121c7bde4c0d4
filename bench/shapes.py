"""Shapes of the parameters of well-known models, written down from their architectures."""

from __future__ import annotations

from collections.abc import Iterator

Shape = tuple[int, ...]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def _resnet50() -> Iterator[Shape]:
    """Weights and biases of ResNet-50 with 1000 classes.

    Source: He et al. 2015, table 1; stride and order as in torchvision.
    """
    yield (64, 3, 7, 7)
    yield from _norm(64)
    inner, into = 64, 64
    for blocks in (3, 4, 6, 3):
        out = 4 * inner
        for block in range(blocks):
            for shape in ((inner, into, 1, 1), (inner, inner, 3, 3), (out, inner, 1, 1)):
                yield shape
                yield from _norm(shape[0])
            if block == 0:  # the shortcut changes the width
                yield (out, into, 1, 1)
                yield from _norm(out)
            into = out
        inner *= 2
    yield (1000, into)
    yield (1000,)


def _transformer(width: int, layers: int) -> Iterator[Shape]:
    """Blocks of attention and a perceptron of four times the width, with biases and norms."""
    for _ in range(layers):
        yield from _norm(width)
        for out, into in ((3 * width, width), (width, width)):
            yield (out, into)
            yield (out,)
        yield from _norm(width)
        for out, into in ((4 * width, width), (width, 4 * width)):
            yield (out, into)
            yield (out,)


def _vit_b_16() -> Iterator[Shape]:
    """ViT-B/16 on images of 224 x 224 with 1000 classes.

    Source: Dosovitskiy et al. 2020, table 1.
    """
    yield (1, 1, 768)
    yield (768, 3, 16, 16)
    yield (768,)
    yield (1, 1 + (224 // 16) ** 2, 768)
    yield from _transformer(768, 12)
    yield from _norm(768)
    yield (1000, 768)
    yield (1000,)


def _gpt2() -> Iterator[Shape]:
    """The smallest GPT-2, whose output layer is its embedding.

    Source: Radford et al. 2019, table 2; vocabulary of 50257.
    """
    yield (50257, 768)
    yield (1024, 768)
    yield from _transformer(768, 12)
    yield from _norm(768)


MODELS: dict[str, list[Shape]] = {
    "ResNet-50": list(_resnet50()),
    "ViT-B/16": list(_vit_b_16()),
    "GPT-2 124M": list(_gpt2()),
}

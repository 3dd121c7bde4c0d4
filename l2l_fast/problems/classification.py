"""Small networks that classify images, the neural-network problems of the paper."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from l2l_fast.datasets import DATASETS, Dataset, load

Activation = Literal["sigmoid", "relu", "tanh", "elu"]
Split = Literal["train", "held_out", "test"]

EVALUATED_IMAGES = 8192

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "elu": torch.nn.functional.elu,
}


@dataclass(frozen=True, repr=False)
class ImageClassifier:
    """Train a multi-layer perceptron on images: cross-entropy on minibatches drawn with replacement.

    Instances differ in their starting point and their minibatches. Pixels lie in [0, 1].

    Args:
        dataset: ``"mnist"`` or ``"digits"``, see :func:`l2l_fast.datasets.load`.
        hidden: units of each hidden layer, an int for a single one; empty for softmax regression.
        activation: after each hidden layer.
        minibatch: images in a minibatch.
        init_std: standard deviation of the iid Gaussian that all weights and biases start from. The paper gives
            none; 0.01 is that of the code published with it.
        held_out: share of the training images, the last ones, that networks are not trained on: the loss that
            counts in meta-training and validation is on those, so that a rule learns not to overfit. 0 keeps none.

    Raises:
        ValueError, TypeError: if a setting has no meaning.

    Source: Andrychowicz et al. 2016, section 3.2.
    """

    dataset: str = "mnist"
    hidden: tuple[int, ...] = (20,)
    activation: Activation = "sigmoid"
    minibatch: int = 128
    init_std: float = 0.01
    held_out: float = 0.0

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            known = ", ".join(map(repr, DATASETS))
            raise ValueError(f"unknown data set {self.dataset!r}; known data sets: {known}")
        hidden = tuple(self.hidden) if isinstance(self.hidden, list | tuple) else (self.hidden,)
        object.__setattr__(self, "hidden", hidden)
        for name, value in (("hidden", units) for units in hidden):
            _check_positive_int(name, value)
        _check_positive_int("minibatch", self.minibatch)
        if self.activation not in get_args(Activation):
            known = ", ".join(map(repr, get_args(Activation)))
            raise ValueError(f"unknown activation {self.activation!r}; known activations: {known}")
        if isinstance(self.init_std, bool) or not isinstance(self.init_std, int | float):
            raise TypeError(f"init_std must be a number, got {self.init_std!r}")
        if not (math.isfinite(self.init_std) and self.init_std > 0):
            raise ValueError(f"init_std must be finite and positive, got {self.init_std}")
        if isinstance(self.held_out, bool) or not isinstance(self.held_out, int | float):
            raise TypeError(f"held_out must be a number, got {self.held_out!r}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be a share of the images, at least 0 and below 1, got {self.held_out}")

    def __repr__(self) -> str:
        # As before there were held-out images, for the checkpoints of then.
        shown = [setting.name for setting in fields(self) if setting.name != "held_out" or self.held_out]
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> ImageClassifierInstances:
        """``batch_size`` networks to train, in float32; all randomness is in their starts and minibatches.

        Raises:
            ValueError: if ``batch_size`` is not positive, or the data is damaged.
            OSError: if the data is not there and can't be fetched.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        instances = HeldOutClassifierInstances if self.held_out else ImageClassifierInstances
        return instances(self, load(self.dataset), batch_size, device)


class ImageClassifierInstances:
    """A batch of networks of one architecture. Parameters are ``w1 [batch, in, out]``, ``b1 [batch, out]`` and so on.

    Args:
        problem: architecture and minibatch.
        data: the images.
        batch: how many networks.
        device: where they are trained; ``None`` is the CPU.
    """

    def __init__(self, problem: ImageClassifier, data: Dataset, batch: int, device: torch.device | str | None) -> None:
        self.problem = problem
        self.batch = batch
        self._largest = data.largest
        self._splits = _splits_on(data, torch.device("cpu" if device is None else device), problem.held_out)
        pixels = self._splits["train"][0].shape[1]
        self._widths = (pixels, *problem.hidden, data.classes)

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Starting points, iid Gaussian."""
        source = "cpu" if generator is None else generator.device
        device = self._splits["train"][0].device
        params = {}
        for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(self._widths), start=1):
            for name, shape in ((f"w{layer}", (fan_in, fan_out)), (f"b{layer}", (fan_out,))):
                values = torch.randn(self.batch, *shape, generator=generator, dtype=torch.float32, device=source)
                params[name] = self.problem.init_std * values.to(device)
        return params

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy ``[batch]`` in nats, each network on a minibatch of its own."""
        return self._loss_on("train", params, generator)

    def draw(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Minibatches: indices of images ``{"chosen": [batch, minibatch]}``."""
        return self._draw("train", self.batch, generator)

    def _loss_on(self, split: Split, params: Mapping[str, Tensor], generator: torch.Generator | None) -> Tensor:
        batch = next(iter(params.values())).shape[0]
        return self._loss_of(split, params, self._draw(split, batch, generator))

    def _draw(self, split: Split, batch: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        images, _ = self._splits[split]
        source = "cpu" if generator is None else generator.device
        chosen = torch.randint(len(images), (batch, self.problem.minibatch), generator=generator, device=source)
        return {"chosen": _send(chosen, images.device)}

    def loss_of(self, params: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy ``[batch]`` in nats on the minibatches ``drawn``."""
        return self._loss_of("train", params, drawn)

    def _loss_of(self, split: Split, params: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        images, labels = self._splits[split]
        chosen = drawn["chosen"]
        # Copies whole images, which indexing by a matrix takes ten times as long for.
        rows = images.index_select(0, chosen.view(-1)).view(*chosen.shape, -1)
        return _cross_entropy(self._logits(params, self._pixels(rows, params)), labels[chosen])

    @torch.no_grad()
    def evaluate(self, params: Mapping[str, Tensor], split: Split | None = None) -> Tensor:
        """Cross-entropy ``[batch]`` on the first 8192 images of a split, the same for every network: free of noise.

        Args:
            split: ``None`` is what counts: the held-out images, or where there are none those trained on.

        Raises:
            ValueError: if there is no such split.
        """
        if split is None:
            split = "held_out" if "held_out" in self._splits else "train"
        if split not in self._splits:
            raise ValueError(f"no split {split!r}; there is {', '.join(map(repr, self._splits))}")
        images, labels = (tensor[:EVALUATED_IMAGES] for tensor in self._splits[split])
        batch = next(iter(params.values())).shape[0]
        losses = []
        for image_rows, label_rows in zip(torch.split(images, 1024), torch.split(labels, 1024), strict=True):
            logits = self._logits(params, self._pixels(image_rows, params).expand(batch, -1, -1))
            losses.append(_cross_entropy(logits, label_rows.expand(batch, -1)) * len(label_rows))
        return torch.stack(losses).sum(0) / len(images)

    def _pixels(self, images: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return images.to(params["w1"].dtype).div_(self._largest)

    def _logits(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """``[batch, images, classes]`` from pixels ``[batch, images, pixels]``."""
        activate = _ACTIVATIONS[self.problem.activation]
        layers = len(self._widths) - 1
        for layer in range(1, layers + 1):
            x = torch.baddbmm(params[f"b{layer}"].unsqueeze(1), x, params[f"w{layer}"])
            if layer < layers:
                x = activate(x)
        return x


class HeldOutClassifierInstances(ImageClassifierInstances):
    """Those whose losses that count are on images that they are not trained on."""

    def outer_loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy ``[batch]`` in nats, each network on a minibatch of held-out images of its own."""
        return self._loss_on("held_out", params, generator)


def mnist(**settings: object) -> ImageClassifier:
    """MNIST: by default 784-20-10, sigmoid, minibatches of 128."""
    return ImageClassifier("mnist", **settings)  # type: ignore[arg-type]  # checked at run time


def digits(**settings: object) -> ImageClassifier:
    """scikit-learn's 8 x 8 digits, which need no download: by default 64-20-10, sigmoid, minibatches of 128."""
    return ImageClassifier("digits", **settings)  # type: ignore[arg-type]  # checked at run time


@functools.lru_cache(maxsize=8)
def _splits_on(data: Dataset, device: torch.device, held_out: float) -> dict[Split, tuple[Tensor, Tensor]]:
    """Rows of pixels and labels of each split, copied to a device once and not for every run."""
    images, labels = data.train_images.flatten(1).to(device), data.train_labels.to(device)
    splits: dict[Split, tuple[Tensor, Tensor]] = {
        "train": (images, labels),
        "test": (data.test_images.flatten(1).to(device), data.test_labels.to(device)),
    }
    if held_out:
        # The last ones, for images of one hand lie together: among others of that hand they would not be new.
        kept = len(images) - min(max(1, round(held_out * len(images))), len(images) - 1)
        splits["train"], splits["held_out"] = (images[:kept], labels[:kept]), (images[kept:], labels[kept:])
    return splits


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, without waiting for a GPU."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over images ``[batch]``."""
    return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).mean((1, 2))


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")

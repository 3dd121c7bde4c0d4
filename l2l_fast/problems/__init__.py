"""Problems to meta-train and to evaluate rules on, and the protocol that makes one.

A problem samples a batch of *independent* instances; one unroll then works on the whole batch, whose
coordinates are just more coordinates to the rule. Random numbers come from the generator handed in
and from nothing else: the same generator state gives the same instances, whatever the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from l2l_fast.problems.classification import ImageClassifier as ImageClassifier
from l2l_fast.problems.classification import digits, mnist
from l2l_fast.problems.module import module_problem as module_problem
from l2l_fast.problems.quadratic import Quadratic as Quadratic
from l2l_fast.problems.user import load_problem as load_problem
from l2l_fast.problems.user import parse_settings as parse_settings


class Instances(Protocol):
    """A batch of independent problem instances."""

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Parameters to start from, by name; every one ``[batch, ...]``, all of one dtype and device."""

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        """Loss of every instance ``[batch]``, on a minibatch drawn from ``generator`` where there is data.

        Row ``b`` depends on row ``b`` of the parameters only, and the same parameters and generator state give the
        same loss again.
        """


@runtime_checkable
class Evaluates(Protocol):
    """Instances that can also say how good parameters are without the noise of minibatches."""

    def evaluate(self, params: Mapping[str, Tensor]) -> Tensor:
        """Loss of every instance ``[batch]`` on data that are the same at each call; not differentiable."""


@runtime_checkable
class HeldOut(Protocol):
    """Instances whose losses that count are on other data than the gradients that a rule is fed."""

    def outer_loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        """Loss of every instance ``[batch]``, on a minibatch of held-out data; otherwise as ``loss``.

        Meta-training minimises this one, and ``losses`` of an unroll are these.
        """


@runtime_checkable
class Replayable(Protocol):
    """Instances whose losses a CUDA graph can hold: first all is drawn that differs from one call to the next."""

    def draw(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What a loss needs beside the parameters: minibatches, and what sets these instances apart from others.

        Always of the same names and shapes, on the device of the instances.
        """

    def loss_of(self, params: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """The losses ``[batch]`` on what :meth:`draw` gave: with the same generator those that ``loss`` returns.

        Apart from ``drawn`` it depends on nothing but what all instances of the problem share. It draws no random
        numbers (a graph may hold those of a device without an error, from a generator that no checkpoint holds), and
        neither reads values on the host nor waits for the device in another way.
        """


class Problem(Protocol):
    """A distribution over problem instances.

    Its ``repr`` says which one it is; without one of its own, its class and its public attributes of
    plain values do (numbers, strings, lists and the like).
    """

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Instances:
        """``batch_size`` independent instances on ``device``, a function of the state of ``generator`` alone."""


PROBLEMS: dict[str, Callable[..., Problem]] = {"quadratic": Quadratic, "mnist": mnist, "digits": digits}

"""Runs in a mirror: half of the coordinates, drawn at random, point the other way.

What a fresh rule does is about the same for all coordinates, so they drift one way, and the hundreds of them that feed
one unit of a network saturate it within a few steps: nothing can be learned of such runs, and what noise made of the
rule stays as it is. In a mirror a common drift moves a sum of many coordinates by little. But a rule that is trained on
such runs alone comes to use the drift, as noise that tells units apart, and fails without the mirror.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from l2l_fast.problems import HeldOut, Instances, Replayable


def mirrored(instances: Instances, seed: int | None) -> Instances:
    """``instances`` with the sign of half of the coordinates changed, of those that ``seed`` draws.

    Args:
        seed: ``None`` changes no sign, and gives instances of the same kind.
    """
    if isinstance(instances, HeldOut):
        return _HeldOut(instances, seed)
    if isinstance(instances, Replayable):
        return _Replayable(instances, seed)
    return _Mirrored(instances, seed)


class _Mirrored:
    def __init__(self, instances: Instances, seed: int | None) -> None:
        self._instances = instances
        own = torch.Generator().manual_seed(seed or 0)
        self._signs = {}
        for name, tensor in instances.init(generator=own).items():
            ones = torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")
            if seed is not None:
                ones -= 2 * torch.randint(2, tensor.shape, generator=own, device="cpu")
            self._signs[name] = ones.to(tensor.device)

    @property
    def problem(self) -> object:
        """What the instances are of, if they say so."""
        return getattr(self._instances, "problem", None)

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return self._flip(self._instances.init(generator=generator))

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return self._instances.loss(self._flip(params), generator=generator)

    def _flip(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor * self._signs[name] for name, tensor in params.items()}


class _HeldOut(_Mirrored):
    _instances: HeldOut  # type: ignore[assignment]  # and Instances

    def outer_loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return self._instances.outer_loss(self._flip(params), generator=generator)


class _Replayable(_Mirrored):
    """The signs are among what is drawn, as they set these instances apart from others."""

    _instances: Replayable  # type: ignore[assignment]  # and Instances

    def draw(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        drawn = {f"drawn.{name}": tensor for name, tensor in self._instances.draw(generator=generator).items()}
        return drawn | {f"sign.{name}": signs for name, signs in self._signs.items()}

    def loss_of(self, params: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        inner = {name.removeprefix("drawn."): tensor for name, tensor in drawn.items() if name.startswith("drawn.")}
        flipped = {name: tensor * drawn[f"sign.{name}"] for name, tensor in params.items()}
        return self._instances.loss_of(flipped, inner)

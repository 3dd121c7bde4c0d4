"""Random least-squares problems, the synthetic functions of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Variant = Literal["gaussian", "deepmind"]


@dataclass(frozen=True)
class Quadratic:
    """``f(theta) = ||W theta - y||^2`` with a ``W [dim, dim]`` and a ``y [dim]`` of its own for each instance.

    Args:
        dim: number of coordinates of ``theta``.
        variant: ``"gaussian"`` draws ``W``, ``y`` and ``theta_0`` iid from N(0, 1), as the paper says;
            ``"deepmind"`` draws ``W`` and ``y`` uniformly from [0, 1) and ``theta_0`` with standard
            deviation 0.01, as the code published with it does.

    Raises:
        ValueError, TypeError: if ``dim`` is no positive integer or the variant is unknown.

    Source: Andrychowicz et al. 2016, section 3.1.
    """

    dim: int = 10
    variant: Variant = "gaussian"

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise TypeError(f"dim must be an int, got {type(self.dim).__name__}")
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}")
        if self.variant not in get_args(Variant):
            known = ", ".join(map(repr, get_args(Variant)))
            raise ValueError(f"unknown variant {self.variant!r}; known variants: {known}")

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> QuadraticInstances:
        """``batch_size`` functions in float32.

        Raises:
            ValueError: if ``batch_size`` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        draw = torch.randn if self.variant == "gaussian" else torch.rand
        source = "cpu" if generator is None else generator.device
        w = draw(batch_size, self.dim, self.dim, generator=generator, dtype=torch.float32, device=source)
        y = draw(batch_size, self.dim, generator=generator, dtype=torch.float32, device=source)
        return QuadraticInstances(w.to(device), y.to(device), 1.0 if self.variant == "gaussian" else 0.01)


class QuadraticInstances:
    """A batch of functions ``||W theta - y||^2``.

    Args:
        w: ``[batch, dim, dim]``.
        y: ``[batch, dim]``.
        init_std: standard deviation of the starting points.
    """

    def __init__(self, w: Tensor, y: Tensor, init_std: float = 1.0) -> None:
        self.w = w
        self.y = y
        self.init_std = init_std
        self._minus_y = -y.unsqueeze(-1)

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Starting points ``{"theta": [batch, dim]}``."""
        source = "cpu" if generator is None else generator.device
        theta = torch.randn(self.y.shape, generator=generator, dtype=self.y.dtype, device=source)
        return {"theta": self.init_std * theta.to(self.y.device)}

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        """Function values ``[batch]``; there is no data, so ``generator`` is not used."""
        return self.loss_of(params, self.draw())

    def draw(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The constants ``{"w": [batch, dim, dim], "minus_y": [batch, dim, 1]}``; ``generator`` is not used."""
        return {"w": self.w, "minus_y": self._minus_y}

    def loss_of(self, params: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> Tensor:
        """Values ``[batch]`` of the functions with the constants ``drawn``."""
        residual = torch.baddbmm(drawn["minus_y"], drawn["w"], params["theta"].unsqueeze(-1))
        return residual.square().sum((1, 2))

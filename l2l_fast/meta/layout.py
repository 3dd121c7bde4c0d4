"""The parameters of a batch of instances as one flat vector of coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Layout:
    """Where each named parameter lies in the flat vector of all ``N`` coordinates.

    Args:
        params: ``[batch, ...]`` each, by name.
        rule: what is to step them.

    Raises:
        TypeError, ValueError: if the parameters are not alike in batch, dtype and device, or do not suit the rule.
    """

    def __init__(self, params: Mapping[str, Tensor], rule: nn.Module) -> None:
        _check_params(params, rule)
        self.shapes = {name: tensor.shape for name, tensor in params.items()}
        self.sizes = [tensor.numel() for tensor in params.values()]
        first = next(iter(params.values()))
        self.batch, self.dtype, self.device = first.shape[0], first.dtype, first.device
        self.n = sum(self.sizes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The named parameters as views of ``flat [N]``."""
        blocks = torch.split(flat, self.sizes)
        return {name: block.view(shape) for (name, shape), block in zip(self.shapes.items(), blocks, strict=True)}

    def gather(self, blocks: Sequence[Tensor], out: Tensor) -> Tensor:
        """Tensors shaped as the parameters, in their order, written to the flat vector ``out [N]``."""
        return torch.cat([block.reshape(-1) for block in blocks], out=out)

    def spread(self, values: Tensor) -> Tensor:
        """One value per instance ``[batch]`` as one per coordinate ``[N]``."""
        return torch.cat([values.repeat_interleave(size // self.batch) for size in self.sizes])

    def root_mean_squares(self, flat: Tensor) -> Tensor:
        """Of each instance's part of each parameter in ``flat [N]``, one per coordinate ``[N]``."""
        means = []
        for block, size in zip(torch.split(flat, self.sizes), self.sizes, strict=True):
            squares = block.view(self.batch, -1).square().mean(1)
            means.append(squares.sqrt().repeat_interleave(size // self.batch))
        return torch.cat(means)

    def check_losses(self, losses: Tensor, of: str = "loss") -> None:
        if losses.shape != (self.batch,):
            raise ValueError(
                f"instances.{of} must return one loss per instance, shape ({self.batch},), got {tuple(losses.shape)}"
            )
        if torch.is_grad_enabled() and not losses.requires_grad:
            raise ValueError(f"instances.{of} returned losses that do not depend on the parameters it was given")


def _check_params(params: Mapping[str, Tensor], rule: nn.Module) -> None:
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a dict of tensors, got {type(params).__name__}")
    if not params:
        raise ValueError("params is empty; give at least one tensor by name")
    first_name, first = next(iter(params.items()))
    weight = next((p for p in rule.parameters() if p.is_floating_point()), None)
    for name, tensor in params.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            raise TypeError(f"params[{name!r}] must be a dense tensor of real floating point, got {_describe(tensor)}")
        if tensor.dim() == 0 or tensor.shape[0] != first.shape[0] or tensor.shape[0] == 0:
            raise ValueError(
                f"params[{name!r}] must have the instances as leading dimension, like params[{first_name!r}] of shape "
                f"{tuple(first.shape)}, got shape {tuple(tensor.shape)}"
            )
        for owner, other in ((f"params[{first_name!r}]", first), ("the rule", weight)):
            if other is not None and tensor.dtype != other.dtype:
                raise TypeError(
                    f"params[{name!r}] is {tensor.dtype} but {owner} is {other.dtype}; convert one of them with .to()"
                )
            if other is not None and tensor.device != other.device:
                raise ValueError(
                    f"params[{name!r}] is on {tensor.device} but {owner} is on {other.device}; move one with .to()"
                )
    if not math.prod(first.shape):
        raise ValueError(f"params[{first_name!r}] has no coordinates: shape {tuple(first.shape)}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with layout {value.layout}"
    return type(value).__name__

"""An optimizer made and tuned by hand, for a rule to imitate before it is trained any further."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GRADIENT = 0.05  # where ``lr`` is the length of a step: about the root mean square at the start on MNIST


@dataclass(frozen=True)
class PowerMomentum:
    """Momentum over a power of the gradients' root mean square, with steps that grow shorter.

    With ``m`` and ``s`` the exponential means of gradient and squared gradient, step ``t`` adds::

        -lr * (1 + t / decay_time)**-decay * (g + slow * m) / GRADIENT * (GRADIENT / sqrt(s))**power

    Args:
        lr: length of the first step where the gradient is ``GRADIENT``.
        power: 0 for none of the normalisation of Adam, 1 for all of it.
        slow: weight of the momentum beside the gradient itself.
        momentum: decay of ``m``, which starts at 0.
        memory: decay of ``s``, whose bias to 0 is corrected.
        decay, decay_time: how fast steps grow shorter.
    """

    lr: float
    power: float
    slow: float
    momentum: float
    memory: float
    decay: float
    decay_time: float

    def __call__(self, params: list[Tensor], /) -> torch.optim.Optimizer:
        """An optimizer of ``params``."""
        return _Optimizer(params, self)

    def factor(self, step: int) -> float:
        """What ``(g + slow * m) / sqrt(s)**power`` is multiplied by."""
        decayed = self.lr * math.pow(1 + step / self.decay_time, -self.decay)
        return decayed * math.pow(GRADIENT, self.power - 1)


class _Optimizer(torch.optim.Optimizer):
    def __init__(self, params: Iterable[Tensor], settings: PowerMomentum) -> None:
        super().__init__(params, {})
        self._settings = settings

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self._step(param)

    def _step(self, param: Tensor) -> None:
        settings, state, grad = self._settings, self.state[param], param.grad
        assert grad is not None
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(param), "square": torch.zeros_like(param)}
        factor = settings.factor(state["step"])
        state["step"] += 1
        state["mean"].lerp_(grad, 1 - settings.momentum)
        state["square"].mul_(settings.memory).addcmul_(grad, grad, value=1 - settings.memory)
        scale = (state["square"] / (1 - settings.memory ** state["step"])).sqrt_().add_(1e-8).pow_(settings.power)
        param.addcdiv_(torch.add(grad, state["mean"], alpha=settings.slow), scale, value=-factor)

"""An optimizer made and tuned by hand, for a rule to imitate before it is trained any further."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST = 1e18  # larger gradients count as of this size, whose square is a number in float32
GRADIENT = 0.05  # where ``lr`` is the length of a step: about the root mean square at the start on MNIST


@dataclass(frozen=True)
class PowerMomentum:
    """Steps by how much gradients agree, of a length that a power of their root mean square sets, growing shorter.

    With ``m`` and ``s`` the exponential means of gradient and squared gradient, step ``t`` adds::

        -lr * shorter_t * (rms / GRADIENT)**(1 - power) * sign(w) * abs(w)**agreement
        rms = sqrt(s) + 1e-8
        w = (g + slow * m) / ((1 + slow) * rms)
        shorter_t = (1 + t / decay_time)**-decay * (settled + (1 - settled) * sigmoid((settle_at - t) / settle_width))

    so that ``w`` is about 1 or -1 where gradients are all alike, once ``m`` has caught up with them, and near 0 where
    they are noise. A gradient far larger than those before makes it larger. ``m`` and ``s`` are float32 or wider.

    Args:
        lr: length of a step where ``w`` is 1 and gradients are ``GRADIENT``, before steps grow shorter.
        power: 0 for none of the normalisation of Adam, 1 for all of it; above that, up to 2, large gradients make short
            steps.
        slow: weight of the momentum beside the gradient itself.
        momentum: decay of ``m``, which starts at 0.
        memory: decay of ``s``, whose bias to 0 is corrected.
        agreement: 1 for momentum as it is; the higher, the shorter the steps of noise.
        decay, decay_time: how fast steps grow shorter.
        settled: to which fraction of that they fall towards the end,
        settle_at, settle_width: around which step, and over how many.

    Raises:
        TypeError, ValueError: if a setting has no meaning.
    """

    lr: float
    power: float
    slow: float
    momentum: float
    memory: float
    agreement: float
    decay: float
    decay_time: float
    settled: float = 1.0
    settle_at: float = 0.0
    settle_width: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        for name in ("lr", "agreement", "decay_time", "settle_width"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.power <= 2:
            raise ValueError(f"power must be at least 0 and at most 2, got {self.power}")
        if self.slow < 0:
            raise ValueError(f"slow must not be negative, got {self.slow}")
        for name in ("momentum", "memory"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")

    def __call__(self, params: list[Tensor], /) -> torch.optim.Optimizer:
        """An optimizer of ``params``."""
        return _Optimizer(params, self)

    def length(self, step: int) -> float:
        """The length of step ``step`` where ``w`` is 1 and gradients are ``GRADIENT``."""
        decayed = math.pow(1 + step / self.decay_time, -self.decay)
        fallen = 0.5 + 0.5 * math.tanh((step - self.settle_at) / self.settle_width / 2)
        return self.lr * decayed * (1 - (1 - self.settled) * fallen)


class _Optimizer(torch.optim.Optimizer):
    def __init__(self, params: Iterable[Tensor], settings: PowerMomentum) -> None:
        super().__init__(params, {})
        self._settings = settings

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, param.grad)
        return loss

    def _step(self, param: Tensor, grad: Tensor) -> None:
        settings, state = self._settings, self.state[param]
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32)).clamp(-LARGEST, LARGEST)
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(grad), "square": torch.zeros_like(grad)}
        length = settings.length(state["step"])
        state["step"] += 1
        state["mean"].lerp_(grad, 1 - settings.momentum)
        state["square"].mul_(settings.memory).addcmul_(grad, grad, value=1 - settings.memory)
        rms = (state["square"] / (1 - settings.memory ** state["step"])).sqrt_().add_(1e-8)
        agreed = torch.add(grad, state["mean"], alpha=settings.slow).div_(rms).div_(1 + settings.slow)
        agreed = agreed.abs().pow_(settings.agreement).copysign_(agreed)
        param.addcmul_(agreed, rms.div_(GRADIENT).pow_(1 - settings.power), value=-length)

"""What meta-training minimises: a weighted sum over the steps of a run, averaged over instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Objective = Literal["loss", "log"]


@dataclass(frozen=True)
class MetaLoss:
    """Mean over instances of ``sum_t weights[t] * phi(f(theta_t))``.

    Attributes:
        weights: ``[T + 1]`` in float64 on the CPU.
        objective: ``phi`` is the identity for ``"loss"`` and the natural logarithm for ``"log"``, which gives every
            decade of the loss the same weight and asks for positive losses.

    Source: Andrychowicz et al. 2016, equation 3.
    """

    weights: Tensor
    objective: Objective

    def value(self, losses: Tensor) -> Tensor:
        """The scalar for ``losses [T + 1, batch]``."""
        terms = losses.log() if self.objective == "log" else losses
        return torch.mv(terms.t(), self.weights.to(terms)).mean()

    def term(self, step: int, losses: Tensor) -> Tensor:
        """The part of one step, for its ``losses [batch]``; differentiable."""
        terms = losses.log() if self.objective == "log" else losses
        return self.weights[step].to(terms) * terms.mean()

    def slopes(self, losses: Tensor) -> Tensor | None:
        """``phi'(f)`` for losses of any shape; ``None`` if it is 1."""
        return losses.reciprocal() if self.objective == "log" else None


def as_meta_loss(loss_weights: Sequence[float] | Tensor | None, steps: int, objective: str) -> MetaLoss:
    """The meta-loss of a run of ``steps`` steps.

    Args:
        loss_weights: ``[steps + 1]``; ``None`` is 1 for every point.

    Raises:
        ValueError: if the objective is unknown, or the weights are too many or few, not finite or require grad.
    """
    if objective not in get_args(Objective):
        raise ValueError(
            f"unknown objective {objective!r}; known objectives: {', '.join(map(repr, get_args(Objective)))}"
        )
    if loss_weights is None:
        return MetaLoss(torch.ones(steps + 1, dtype=torch.float64, device="cpu"), objective)  # type: ignore[arg-type]
    if isinstance(loss_weights, Tensor) and loss_weights.requires_grad:
        raise ValueError(
            "loss_weights must not require grad; the derivative by the weight of step t is run.losses[t].mean()"
        )
    weights = torch.as_tensor(loss_weights, dtype=torch.float64, device="cpu").detach()
    if weights.shape != (steps + 1,):
        raise ValueError(
            f"loss_weights must have one entry for each of the {steps + 1} points of {steps} steps, "
            f"the start and the end included, got shape {tuple(weights.shape)}"
        )
    if not weights.isfinite().all():
        raise ValueError("loss_weights must be finite")
    return MetaLoss(weights, objective)  # type: ignore[arg-type]  # checked above

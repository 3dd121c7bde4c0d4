"""What becomes of small updates of bfloat16 parameters: ``python -m l2l_fast.experiments.rounding``.

Rounded to nearest, an update below half a unit in the last place is lost at every step; rounded at random it counts on
average. Once for updates of one size, once for the shipped rule on the quadratics that it was trained for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from l2l_fast.optim import LearnedOptimizer
from l2l_fast.problems import Quadratic
from l2l_fast.rule import CoordinatewiseLSTM, load_rule

COORDINATES = 4096
STEPS = 1000
UNITS = (0.51, 0.49, 0.25, 0.1, 0.01)  # updates in units in the last place
FUNCTIONS = 512

WAYS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16, to nearest": (torch.bfloat16, {}),
    "bfloat16, at random": (torch.bfloat16, {"stochastic_rounding": True}),
}


@dataclass(frozen=True)
class Vanishing:
    """Share of ``STEPS`` equal updates that arrives in the mean of all parameters, by way of storing them."""

    unit: float
    arrived: dict[str, float]


def constant_rule(update: float) -> CoordinatewiseLSTM:
    """A rule whose update is ``update`` whatever the gradient."""
    rule = CoordinatewiseLSTM(output_scale=1.0)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.zero_()
        rule.output.bias.fill_(update)
    return rule


def vanishing(unit: float, coordinates: int = COORDINATES, steps: int = STEPS) -> Vanishing:
    """Parameters that start at 1 take ``steps`` updates down, of ``unit`` units in the last place below 1."""
    update = unit * torch.finfo(torch.bfloat16).eps / 2
    arrived = {}
    for name, (dtype, options) in WAYS.items():
        param = nn.Parameter(torch.ones(coordinates, dtype=dtype))
        optimizer = LearnedOptimizer([param], constant_rule(-update), **options)
        param.grad = torch.zeros_like(param)
        # The unit halves below 1/2: nothing gets there, were every update rounded up to a unit and more.
        taken = min(steps, int(0.25 / update))
        for _ in range(taken):
            optimizer.step()
        arrived[name] = (1 - param.detach().double().mean().item()) / (taken * update)
    return Vanishing(unit, arrived)


def quadratics(functions: int = FUNCTIONS, steps: int = 100) -> dict[str, float]:
    """Mean loss of the rule ``quadratic`` after ``steps`` steps on its functions, by way of storing the parameters."""
    generator = torch.Generator().manual_seed(0)
    problem = Quadratic().sample(functions, generator=generator, device="cpu")
    start = problem.init(generator=generator)["theta"]
    losses = {}
    for name, (dtype, options) in WAYS.items():
        theta = nn.Parameter(start.to(dtype))
        theta.grad_dtype = torch.float32  # gradients are those of float32, so that only storage differs
        optimizer = LearnedOptimizer([theta], load_rule("quadratic"), **options)
        for _ in range(steps):
            point = theta.detach().float().requires_grad_()
            (theta.grad,) = torch.autograd.grad(problem.loss({"theta": point}, generator=generator).sum(), point)
            optimizer.step()
        losses[name] = problem.loss({"theta": theta.detach().float()}, generator=generator).mean().item()
    return losses


def main() -> None:
    """Print both tables as Markdown."""
    print(f"| update, units in the last place | {' | '.join(WAYS)} |")
    print("|---|" + "---|" * len(WAYS))
    for unit in UNITS:
        print(f"| {unit} | " + " | ".join(f"{share:.3f}" for share in vanishing(unit).arrived.values()) + " |")
    print(f"\n| | {' | '.join(WAYS)} |")
    print("|---|" + "---|" * len(WAYS))
    print("| mean loss | " + " | ".join(f"{loss:.4f}" for loss in quadratics().values()) + " |")


if __name__ == "__main__":
    main()

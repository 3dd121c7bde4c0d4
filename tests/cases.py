"""The database of cases that every backend has to serve: rules, sizes, gradients, weights, states.

The oracles are cached, for they depend on the case alone and many tests ask for them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_fast import Identity, LogAndSign, RuleSpec, reference

SPECS = {
    "log10": RuleSpec(20, LogAndSign(10.0), 0.1),
    "log15": RuleSpec(20, LogAndSign(15.0), 0.7),
    "identity": RuleSpec(20, Identity(), 0.1),
}

# Around the widths of vectors and tiles, and enough for several threads.
SIZES = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 4097)
STEPS = (1, 2, 20, 100)

Fill = Callable[[int, RuleSpec, torch.Generator], Tensor]


def _normal(n: int, spec: RuleSpec, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator)


def _signs(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (n,), generator=generator) * 2.0 - 1.0


def _decades(n: int, spec: RuleSpec, generator: torch.Generator) -> Tensor:
    """Thirty of them; without the logarithm none far above 1, or one coordinate's rounding is all that is judged."""
    top = 15 if isinstance(spec.preprocess, LogAndSign) else 1
    return _signs(n, generator) * 10 ** (torch.rand(n, generator=generator) * 30 - 30 + top)


def _zero(n: int, spec: RuleSpec, generator: torch.Generator) -> Tensor:
    return _signs(n, generator) * 0.0


def _denormal(n: int, spec: RuleSpec, generator: torch.Generator) -> Tensor:
    return _signs(n, generator) * torch.rand(n, generator=generator) * torch.finfo(torch.float32).tiny


def _threshold(n: int, spec: RuleSpec, generator: torch.Generator) -> Tensor:
    """``exp(-p)``, where the preprocessing changes branch, and the numbers next to it."""
    at = torch.tensor(math.exp(-(spec.log_p or 10.0)))
    around = torch.stack([at, torch.nextafter(at, at * 0), torch.nextafter(at, at * 2)])
    return _signs(n, generator) * around[torch.arange(n) % 3]


def _huge(n: int, spec: RuleSpec, generator: torch.Generator) -> Tensor:
    return _signs(n, generator) * 1e30


def _nonfinite(n: int, spec: RuleSpec, generator: torch.Generator) -> Tensor:
    """Every fifth gradient infinite or NaN, from the first on."""
    specials = torch.tensor([float("inf"), float("-inf"), float("nan")])
    index = torch.arange(n)
    return torch.where(index % 5 == 0, specials[index // 5 % 3], _normal(n, spec, generator))


REGIMES: dict[str, Fill] = {
    "normal": _normal,
    "decades": _decades,
    "zero": _zero,
    "denormal": _denormal,
    "threshold": _threshold,
    "huge": _huge,
    "nonfinite": _nonfinite,
}


def _initial(spec: RuleSpec, generator: torch.Generator) -> Tensor:
    return (torch.rand(spec.num_weights, generator=generator) * 2 - 1) / math.sqrt(spec.hidden_size)


def _trained(spec: RuleSpec, generator: torch.Generator) -> Tensor:
    """As training leaves them: a few large weights, and forget gates that are mostly open."""
    weights = _initial(spec, generator) * (1 + 2 * torch.rand(spec.num_weights, generator=generator) ** 8)
    blocks = reference.split_weights(spec, weights)
    for layer in (1, 2):
        blocks[f"bias_{layer}"][spec.hidden_size : 2 * spec.hidden_size] += 1.5
    return weights


WEIGHTS: dict[str, Callable[[RuleSpec, torch.Generator], Tensor]] = {
    "initial": _initial,
    "large": lambda spec, generator: 3 * _initial(spec, generator),
    "trained": _trained,
}


def make_weights(spec: RuleSpec, generator: torch.Generator, kind: str = "initial") -> Tensor:
    """Weights ``[P]`` of one of the kinds in ``WEIGHTS``."""
    return WEIGHTS[kind](spec, generator)


def make_state(n: int, spec: RuleSpec, generator: torch.Generator) -> Tensor:
    """A state ``[N, 2, 2, H]`` as a run leaves it: ``|h| < 1``, ``c`` of a few units."""
    state = torch.randn(n, 2, 2, spec.hidden_size, generator=generator)
    state[:, :, 0].tanh_()
    state[:, :, 1] *= 2
    return state


class StepInputs(NamedTuple):
    """Arguments of ``step_backward``; the first three are those of ``step``."""

    weights: Tensor
    grad: Tensor
    state: Tensor
    d_update: Tensor
    d_state: Tensor


class UnrollInputs(NamedTuple):
    """Arguments of ``unroll_backward``."""

    weights: Tensor
    grads: Tensor
    loss_weights: Tensor
    state: Tensor | None


Outputs = dict[str, Tensor]


def pool(outputs: list[Outputs]) -> Outputs:
    """Several draws as one, so that what is compared is never the luck of a few numbers."""
    return {name: torch.stack([output[name] for output in outputs]) for name in outputs[0]}


def _draws(n: int, wanted: int) -> int:
    """How many draws of ``n`` coordinates make about ``wanted`` of them."""
    return min(max(1, -(-wanted // n)), 48)


def slope(spec: RuleSpec, grad: Tensor) -> Tensor:
    """Steepness of the preprocessing in float64, which makes gradients by ``grad`` differ in magnitude."""
    if not isinstance(spec.preprocess, LogAndSign):
        return torch.ones_like(grad, dtype=torch.float64)
    p = spec.preprocess.p
    return torch.clamp(1 / (p * grad.double().abs()), max=math.exp(p))


@dataclass(frozen=True)
class StepCase:
    """One step, and its backward, of ``n`` coordinates; drawn a few times over."""

    spec_name: str = "log10"
    n: int = 65
    regime: str = "normal"
    weights: str = "initial"
    coordinates: int = 1024  # at least, of all draws together: with fewer, the worst of eager is a matter of luck

    @property
    def spec(self) -> RuleSpec:
        return SPECS[self.spec_name]

    def __str__(self) -> str:
        return f"{self.spec_name}-N{self.n}-{self.regime}-{self.weights}"

    @property
    def few_draws(self) -> list[StepInputs]:
        """The first of them, for a backend that takes its time."""
        return self.draws[: _draws(self.n, 192)]

    @functools.cached_property
    def draws(self) -> list[StepInputs]:
        generator = torch.Generator().manual_seed(self.n)
        return [
            StepInputs(
                make_weights(self.spec, generator, self.weights),
                REGIMES[self.regime](self.n, self.spec, generator),
                make_state(self.n, self.spec, generator),
                torch.randn(self.n, generator=generator),
                torch.randn(self.n, 2, 2, self.spec.hidden_size, generator=generator),
            )
            for _ in range(_draws(self.n, self.coordinates))
        ]

    def outputs(self, *, update: Tensor, state: Tensor) -> Outputs:
        return {"update": update, "state": state}

    def gradients(self, grad: Tensor, *, d_weights: Tensor, d_grad: Tensor, d_state: Tensor) -> Outputs:
        # Divided by the slope, or else the one coordinate with the smallest gradient is all that is judged.
        return {
            "d_grad / slope": (d_grad.double() / slope(self.spec, grad)).to(d_grad.dtype),
            "d_weights": d_weights,
            "d_state": d_state,
        }

    @functools.cached_property
    def oracle(self) -> tuple[tuple[Outputs, Outputs], tuple[Outputs, Outputs]]:
        """``(outputs, gradients)`` of float32 eager with autograd, and the same of float64."""
        eager = [_eager_step(self, inputs) for inputs in self.draws]
        exact = [_exact_step(self, inputs) for inputs in self.draws]
        return (
            (pool([outputs for outputs, _ in eager]), pool([gradients for _, gradients in eager])),
            (pool([outputs for outputs, _ in exact]), pool([gradients for _, gradients in exact])),
        )


def _eager_step(case: StepCase, inputs: StepInputs) -> tuple[Outputs, Outputs]:
    weights, grad, state = (tensor.clone().requires_grad_() for tensor in inputs[:3])
    update, new_state = reference.step(case.spec, weights, grad, state)
    d_weights, d_grad, d_state = torch.autograd.grad((update, new_state), (weights, grad, state), inputs[3:])
    return (
        case.outputs(update=update.detach(), state=new_state.detach()),
        case.gradients(inputs.grad, d_weights=d_weights, d_grad=d_grad, d_state=d_state),
    )


def _exact_step(case: StepCase, inputs: StepInputs) -> tuple[Outputs, Outputs]:
    exact = StepInputs(*(tensor.double() for tensor in inputs))
    update, state = reference.step(case.spec, *exact[:3])
    d_weights, d_grad, d_state = reference.step_backward(case.spec, *exact)
    return (
        case.outputs(update=update, state=state),
        case.gradients(inputs.grad, d_weights=d_weights, d_grad=d_grad, d_state=d_state),
    )


@dataclass(frozen=True)
class UnrollCase:
    """The meta-gradient of an unroll of ``steps`` steps over ``n`` coordinates; drawn a few times over."""

    spec_name: str = "log10"
    n: int = 65
    steps: int = 2
    regime: str = "normal"
    weights: str = "initial"
    with_state: bool = True
    with_d_points: bool = False
    coordinate_steps: int = 2048  # at least, of all draws together

    @property
    def spec(self) -> RuleSpec:
        return SPECS[self.spec_name]

    def __str__(self) -> str:
        start = "state" if self.with_state else "zeros"
        points = "-points" if self.with_d_points else ""
        return f"{self.spec_name}-N{self.n}-T{self.steps}-{self.regime}-{self.weights}-{start}{points}"

    @functools.cached_property
    def draws(self) -> list[UnrollInputs]:
        generator = torch.Generator().manual_seed(1000 * self.steps + self.n)
        fill = REGIMES[self.regime]
        return [
            UnrollInputs(
                make_weights(self.spec, generator, self.weights),
                fill((self.steps + 1) * self.n, self.spec, generator).view(self.steps + 1, self.n),
                0.5 + torch.rand(self.steps + 1, generator=generator),
                make_state(self.n, self.spec, generator) if self.with_state else None,
            )
            for _ in range(_draws(self.n, self.coordinate_steps // self.steps))
        ]

    @functools.cached_property
    def d_points(self) -> list[Tensor | None]:
        """Of each draw: derivatives by the points that have nothing to do with what the rule sees, or ``None``."""
        generator = torch.Generator().manual_seed(1000 * self.steps + self.n + 1)
        return [torch.randn(i.grads.shape, generator=generator) if self.with_d_points else None for i in self.draws]

    def gradients(self, d_weights: Tensor, d_state: Tensor | None) -> Outputs:
        return {"d_weights": d_weights} if d_state is None else {"d_weights": d_weights, "d_state": d_state}

    @functools.cached_property
    def oracle(self) -> tuple[Outputs, Outputs]:
        """Gradients by float32 eager with autograd, and by float64."""
        draws = list(zip(self.draws, self.d_points, strict=True))
        return (
            pool([self.gradients(*autograd_of_unroll(self.spec, *inputs, points)) for inputs, points in draws]),
            pool([self.gradients(*exact_unroll(self.spec, *inputs, points)) for inputs, points in draws]),
        )


def autograd_of_unroll(
    spec: RuleSpec,
    weights: Tensor,
    grads: Tensor,
    loss_weights: Tensor,
    state: Tensor | None,
    d_points: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What autograd makes of an unroll whose gradients are constants: ``(d_weights, d_state)``.

    The loss at each point is linear in the point, with ``d_points`` (``None``: the given gradient) as its slope.
    """
    slopes = grads if d_points is None else d_points
    weights = weights.clone().requires_grad_()
    start = None if state is None else state.clone().requires_grad_()
    n = grads.shape[1]
    current = weights.new_zeros(n, 2, 2, spec.hidden_size) if start is None else start
    moved = grads.new_zeros(n)
    loss = torch.zeros((), dtype=weights.dtype)
    for t in range(grads.shape[0] - 1):
        update, current = reference.step(spec, weights, grads[t], current)
        moved = moved + update
        loss = loss + loss_weights[t + 1] * (slopes[t + 1] * moved).sum()
    d_weights, *d_state = torch.autograd.grad(loss, (weights,) if start is None else (weights, start))
    return d_weights, d_state[0] if d_state else None


def exact_unroll(
    spec: RuleSpec,
    weights: Tensor,
    grads: Tensor,
    loss_weights: Tensor,
    state: Tensor | None,
    d_points: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same in float64, by the formulas of :mod:`l2l_fast.reference`."""
    start = torch.zeros(grads.shape[1], 2, 2, spec.hidden_size) if state is None else state
    d_weights, d_state = reference.unroll_backward(
        spec,
        weights.double(),
        grads.double(),
        loss_weights.double(),
        start.double(),
        None if d_points is None else d_points.double(),
    )
    return d_weights, None if state is None else d_state


@functools.cache
def thin_unroll(case: UnrollCase) -> UnrollCase:
    """The same case with few draws, and few coordinates if there are many steps."""
    return replace(case, n=min(case.n, 64) if case.steps == 100 else case.n, coordinate_steps=400)


STEP_CASES = [
    *(StepCase(spec, n) for spec in SPECS for n in SIZES),
    *(
        StepCase(spec, regime=regime, weights=weights)
        for spec in SPECS
        for regime in REGIMES
        for weights in WEIGHTS
        if (regime, weights) != ("normal", "initial")  # already among the sizes
    ),
]

UNROLL_CASES = [
    *(UnrollCase(n=n) for n in SIZES),
    *(
        UnrollCase(spec, steps=steps, weights=weights, with_state=with_state)
        for spec in SPECS
        for steps, weights in zip(STEPS, ("trained", "trained", "initial", "initial"), strict=True)
        for with_state in (True, False)
    ),
    *(UnrollCase(spec, n=33, steps=3, regime=regime) for spec in SPECS for regime in REGIMES if regime != "normal"),
    *(
        UnrollCase(spec, n=33, steps=steps, weights="trained", with_state=with_state, with_d_points=True)
        for spec in SPECS
        for steps, with_state in ((1, True), (3, False), (20, True))
    ),
]

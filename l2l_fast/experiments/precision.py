"""How far parameters drift when the state is stored in fewer bits between the steps.

Everything but the storage is exact: the reference in float64, on gradients that do not depend on the parameters, so
that a rounding is not amplified or damped by a loss. The storage dtypes of the optimizer are measured on the backends
as well, float32 arithmetic included. Of the forms below 16 bits they store one, int8; the others exist only here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_fast import int8, reference
from l2l_fast.backends import backends
from l2l_fast.experiments.progress import progress
from l2l_fast.optim import LearnedOptimizer
from l2l_fast.rule import CoordinatewiseLSTM, available_rules, load_rule

COORDINATES = 128
STEPS = 1000
MARKS = (100, 300, 1000)

FLOAT16_BOUND = 4e-3  # of a float16 state, at 300 steps
NARROW_BOUND = 3 * FLOAT16_BOUND  # what a form of fewer bits has to stay below to be worth its kernels

TILE = int8.TILE  # coordinates that share a scale

Round = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Form:
    """A way to store a state; ``/tile`` and ``/coordinate`` in its name say what shares a scale.

    Attributes:
        bits: per number, scales included.
        round: a state ``[N, 2, 2, H]`` in float64, ``N`` a multiple of :data:`TILE`, to what is read back of it.
    """

    name: str
    bits: float
    round: Round


def _cast(dtype: torch.dtype) -> Round:
    return lambda state, _: state.float().to(dtype).double()


def _scaled(largest: float, dim: int, stored: Round) -> Round:
    """``stored`` on numbers brought to at most ``largest`` by a scale that is shared along ``dim``.

    Dimensions are those of ``[N / TILE, TILE, 2, 2, H]``.
    """

    def round_(state: Tensor, generator: torch.Generator) -> Tensor:
        tiles = state.view(-1, TILE, *state.shape[1:])
        # A scale is stored as float16; rounded up, so that nothing leaves the range.
        scale = (tiles.abs().amax(dim, keepdim=True) * (1 + 2**-10)).half().double().clamp_min(2**-24)
        return (stored(tiles / scale * largest, generator) * scale / largest).view_as(state)

    return round_


def _int8(state: Tensor, _: torch.Generator) -> Tensor:
    """As the backends store it, with a power of 2 for the scale."""
    return int8.unpack(int8.pack(state), len(state), state[0].numel()).double()


def _nearest(numbers: Tensor, _: torch.Generator) -> Tensor:
    return numbers.round()


def _randomly(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Up or down at random, right in the mean."""
    return (numbers + torch.rand(numbers.shape, generator=generator, dtype=numbers.dtype)).floor()


def _dithered(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """A random offset that the reader knows and takes off again: an error that does not depend on the number."""
    offset = torch.rand(numbers.shape, generator=generator, dtype=numbers.dtype) - 0.5
    return (numbers + offset).round() - offset


def _hidden_only(stored: Round) -> Round:
    """``stored`` for h, which stays below 1, and float16 for c."""

    def round_(state: Tensor, generator: torch.Generator) -> Tensor:
        h, c = state.unbind(2)
        return torch.stack([stored(h, generator), _cast(torch.float16)(c, generator)], dim=2)

    return round_


_UNITS = 20
_BY_TILE, _BY_COORDINATE = 1, 4  # the dimension that shares a scale
_INT8_BITS, _TILE_BITS, _COORDINATE_BITS = 8 + 8 / TILE, 8 + 16 / TILE, 8 + 16 / _UNITS
_E4M3 = torch.float8_e4m3fn

FORMS = (
    Form("float32", 32, _cast(torch.float32)),
    Form("float16", 16, _cast(torch.float16)),
    Form("bfloat16", 16, _cast(torch.bfloat16)),
    Form("int8", _INT8_BITS, _int8),
    Form("h int8, c float16", 12, _hidden_only(lambda h, g: _nearest(127 * h, g) / 127)),
    Form("h e4m3, c float16", 12, _hidden_only(_cast(_E4M3))),
    Form("e4m3", 8, _cast(_E4M3)),
    Form("e5m2", 8, _cast(torch.float8_e5m2)),
    Form("e4m3/tile", _TILE_BITS, _scaled(448, _BY_TILE, _cast(_E4M3))),
    Form("int8/tile", _TILE_BITS, _scaled(127, _BY_TILE, _nearest)),
    Form("int8/coordinate", _COORDINATE_BITS, _scaled(127, _BY_COORDINATE, _nearest)),
    Form("int8/tile, random", _TILE_BITS, _scaled(127, _BY_TILE, _randomly)),
    Form("int8/tile, dither", _TILE_BITS, _scaled(127, _BY_TILE, _dithered)),
)

# What the backends store, under the name of the form.
STORAGE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Drift:
    """What became of the parameters under one rule and one form.

    Attributes:
        backend: that ran it, or ``"exact"`` for float64 arithmetic.
        bits: stored per number of the state.
        drift: by the number of steps: distance from the exact parameters, relative to the distance that those moved.
        spread: the same relative to their spread over the coordinates, which a motion common to all leaves out.
    """

    rule: str
    backend: str
    form: str
    bits: float
    drift: dict[int, float]
    spread: dict[int, float]


def rules() -> dict[str, CoordinatewiseLSTM]:
    """A fresh rule, one with a long memory, and those that are shipped."""
    found = {}
    for name, forget_bias in (("fresh", 0.0), ("fresh, forget bias 3", 3.0)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            rule = CoordinatewiseLSTM()
        with torch.no_grad():
            for cell in rule.cells:
                assert isinstance(cell, torch.nn.LSTMCell)
                cell.bias_ih[_UNITS : 2 * _UNITS] += forget_bias
        found[name] = rule
    return found | {name: load_rule(name) for name in available_rules()}


def _gradients(steps: int, coordinates: int, seed: int) -> Tensor:
    """``[T, N]``, float32: noise of the size that the preprocessing was made for, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    return math.exp(-3) * torch.randn(steps, coordinates, generator=generator) + 0.05


def simulate(rule: CoordinatewiseLSTM, forms: tuple[Form, ...], grads: Tensor, seed: int = 0) -> Iterator[Tensor]:
    """The parameters ``[1 + forms, N]`` after every step from zero: exact ones first, then those of each form.

    Args:
        grads: ``[T, N]``.
    """
    generator = torch.Generator().manual_seed(seed)
    spec, weights = rule.spec, rule.flat_weights().detach().double()
    runs, n = 1 + len(forms), grads.shape[1]
    state = torch.zeros(runs * n, 2, 2, spec.hidden_size, dtype=torch.float64)
    params = torch.zeros(runs, n, dtype=torch.float64)
    for grad in grads.double():
        update, state = reference.step(spec, weights, grad.repeat(runs), state)
        params = params + update.view(runs, n)
        for form, part in zip(forms, state.view(runs, n, *state.shape[1:])[1:], strict=True):
            part.copy_(form.round(part, generator))
        yield params


def optimize(rule: CoordinatewiseLSTM, backend: str, state_dtype: torch.dtype, grads: Tensor) -> Iterator[Tensor]:
    """The parameters ``[N]`` after every step from zero, by the optimizer."""
    device = "cuda" if backend == "triton" else "cpu"
    param = torch.nn.Parameter(torch.zeros(grads.shape[1], device=device))
    optimizer = LearnedOptimizer([param], rule, backend=backend, state_dtype=state_dtype)
    for grad in grads.to(device):
        param.grad = grad
        optimizer.step()
        yield param.detach().cpu().double()


def measurable_backends() -> list[str]:
    """Those that work here; Triton's interpreter would take hours."""
    return [
        name
        for name, reason in backends().items()
        if reason is None and (name != "triton" or torch.cuda.is_available())
    ]


def _marks(steps: int) -> tuple[int, ...]:
    return (*(mark for mark in MARKS if mark < steps), steps)


def measure(
    chosen: dict[str, CoordinatewiseLSTM] | None = None,
    *,
    coordinates: int = COORDINATES,
    steps: int = STEPS,
    seed: int = 0,
) -> list[Drift]:
    """The drift of every form under every rule, then of the optimizer on every backend that works here.

    Args:
        chosen: rules by name; all of :func:`rules` by default.
        coordinates: a multiple of :data:`TILE`.

    Raises:
        ValueError: if ``coordinates`` is not.
    """
    if coordinates % TILE:
        raise ValueError(f"coordinates must be a multiple of {TILE}, which share a scale, got {coordinates}")
    chosen = rules() if chosen is None else chosen
    bits = {form.name: form.bits for form in FORMS}
    marks, grads = _marks(steps), _gradients(steps, coordinates, seed)
    found = []
    total = len(chosen) * steps * (1 + len(measurable_backends()) * len(STORAGE))
    with progress("stepping with rounded states", total) as advance:
        for name, rule in chosen.items():
            at: dict[int, Tensor] = {}
            for step, params in enumerate(simulate(rule, FORMS, grads, seed), 1):
                advance()
                if step in marks:
                    at[step] = params
            exact = {step: params[0] for step, params in at.items()}
            for index, form in enumerate(FORMS, 1):
                moved = {step: params[index] for step, params in at.items()}
                found.append(_drift(name, "exact", form.name, form.bits, moved, exact))
            for backend in measurable_backends():
                for form_name, dtype in STORAGE.items():
                    moved = {}
                    for step, param in enumerate(optimize(rule, backend, dtype, grads), 1):
                        advance()
                        if step in marks:
                            moved[step] = param
                    found.append(_drift(name, backend, form_name, bits[form_name], moved, exact))
    return found


def _drift(
    rule: str, backend: str, form: str, bits: float, moved: dict[int, Tensor], exact: dict[int, Tensor]
) -> Drift:
    error = {step: float((moved[step] - right).norm()) for step, right in exact.items()}
    return Drift(
        rule,
        backend,
        form,
        bits,
        {step: error[step] / float(right.norm()) for step, right in exact.items()},
        {step: error[step] / float((right - right.mean()).norm()) for step, right in exact.items()},
    )

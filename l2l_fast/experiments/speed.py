"""Time per coordinate of a fused backend against plain PyTorch, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from l2l_fast import reference
from l2l_fast.backends import Backend, get
from l2l_fast.experiments.numerics import fused_backends
from l2l_fast.experiments.progress import progress
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import RuleSpec

FORWARD_COORDINATES = 100_000
META_COORDINATES = 5_000  # autograd keeps about 30 KB for each of them
META_STEPS = 20
ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Nanoseconds per coordinate and step, best of several rounds.

    Attributes:
        what: ``"forward"`` or ``"meta-step"``.
        coordinates: coordinates of one call.
        steps: steps of one call.
        nanoseconds: by implementation; ``"eager"`` is plain PyTorch in float32.
        threads: ``torch.get_num_threads()``.
    """

    what: str
    coordinates: int
    steps: int
    nanoseconds: dict[str, float]
    threads: int


def _interleaved(candidates: dict[str, Callable[[], None]], work: int, rounds: int) -> dict[str, float]:
    """Best nanoseconds per unit of work, the candidates taking turns so that a busy machine hurts all of them."""
    best = dict.fromkeys(candidates, float("inf"))
    with progress("measuring speed", rounds + 1) as advance:
        for warm_up in [True] + [False] * rounds:
            for name, run in candidates.items():
                start = time.perf_counter_ns()
                run()
                if not warm_up:
                    best[name] = min(best[name], (time.perf_counter_ns() - start) / work)
            advance()
    return best


def _stepper(backend: Backend, spec: RuleSpec, weights: Tensor, params: Tensor) -> Callable[[Tensor], None]:
    """A function that steps a copy of ``params [N]`` in place."""
    prepared = backend.prepare(spec, weights)
    params = params.clone()
    state = backend.init_state(params.numel(), spec, torch.float32, params.device)
    return lambda grad: backend.step_(spec, prepared, [params], [grad], [state])


def time_forward(spec: RuleSpec, *, coordinates: int = FORWARD_COORDINATES, rounds: int = ROUNDS) -> Timing:
    """One optimizer step in place: no tape, state kept by the backend."""
    generator = torch.Generator().manual_seed(0)
    weights = _random_weights(spec)
    params, grad = torch.randn(2, coordinates, generator=generator)
    candidates: dict[str, Callable[[], None]] = {}
    for name in (*_working(), "reference"):
        candidates["eager" if name == "reference" else name] = partial(_stepper(get(name), spec, weights, params), grad)
    return Timing("forward", coordinates, 1, _interleaved(candidates, coordinates, rounds), torch.get_num_threads())


def time_meta_step(
    spec: RuleSpec, *, coordinates: int = META_COORDINATES, steps: int = META_STEPS, rounds: int = ROUNDS
) -> Timing:
    """An unroll and its first-order meta-gradient: fused with recompute, eager through autograd's graph."""
    generator = torch.Generator().manual_seed(0)
    weights = _random_weights(spec)
    grads = torch.randn(steps + 1, coordinates, generator=generator)
    loss_weights = torch.ones(steps + 1)
    d_updates = grads[1:].flip(0).cumsum(0).flip(0)

    def eager() -> None:
        leaf = weights.clone().requires_grad_()
        state, updates = torch.zeros(coordinates, 2, 2, spec.hidden_size), []
        for grad in grads[:-1]:
            update, state = reference.step(spec, leaf, grad, state)
            updates.append(update)
        torch.autograd.grad((d_updates * torch.stack(updates)).sum(), leaf)

    def fused(backend: Backend) -> None:
        stepper = _stepper(backend, spec, weights, grads[0])
        for grad in grads[:-1]:
            stepper(grad)
        backend.unroll_backward(spec, weights, grads, loss_weights, None)

    candidates: dict[str, Callable[[], None]] = {name: partial(fused, get(name)) for name in _working()}
    candidates["eager"] = eager
    best = _interleaved(candidates, coordinates * steps, rounds)
    return Timing("meta-step", coordinates, steps, best, torch.get_num_threads())


def _working() -> list[str]:
    return [name for name, reason in fused_backends().items() if reason is None]


def _random_weights(spec: RuleSpec) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rule = CoordinatewiseLSTM(spec.hidden_size, spec.preprocess, spec.output_scale)
    return rule.flat_weights().detach()


def measure(spec: RuleSpec, coordinates: int = FORWARD_COORDINATES) -> list[Timing]:
    """Forward and meta-step of every backend that works here, and of eager PyTorch.

    Args:
        coordinates: of the forward; the meta-step has at most :data:`META_COORDINATES`.
    """
    meta_coordinates = min(coordinates, META_COORDINATES)
    return [time_forward(spec, coordinates=coordinates), time_meta_step(spec, coordinates=meta_coordinates)]

"""Time per coordinate of a fused backend on the CPU against plain PyTorch, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from l2l_fast import reference
from l2l_fast.backends import NAMES, Backend, get
from l2l_fast.experiments.progress import progress
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import RuleSpec

FORWARD_COORDINATES = 100_000
META_COORDINATES = 5_000  # autograd keeps about 30 KB for each of them
META_STEPS = 20
ROUNDS = 5

Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, tuple[Tensor, ...]]]


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


def eager_step(rule: CoordinatewiseLSTM) -> Step:
    """One step as PyTorch users write it: two ``nn.LSTMCell`` and a ``nn.Linear``, states as separate tensors."""
    first, second = rule.cells

    def step(grad: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        h1, c1 = first(reference.features(rule.spec, grad), state[:2])
        h2, c2 = second(h1, state[2:])
        return rule.spec.output_scale * rule.output(h2).squeeze(-1), (h1, c1, h2, c2)

    return step


def zero_state(rule: CoordinatewiseLSTM, n: int) -> tuple[Tensor, ...]:
    """A fresh state as :func:`eager_step` takes it."""
    return tuple(torch.zeros(n, rule.spec.hidden_size) for _ in range(4))


def time_forward(spec: RuleSpec, *, coordinates: int = FORWARD_COORDINATES, rounds: int = ROUNDS) -> Timing:
    """One optimizer step in place: no tape, state kept by the backend."""
    rule = _random_rule(spec)
    params, grad = torch.randn(2, coordinates, generator=torch.Generator().manual_seed(0))
    step, state = eager_step(rule), zero_state(rule, coordinates)

    @torch.no_grad()
    def eager() -> None:
        update, _ = step(grad, state)
        params.add_(update)

    weights = rule.flat_weights().detach()
    candidates: dict[str, Callable[[], None]] = {
        name: partial(_stepper(get(name), spec, weights, params), grad) for name in _working()
    }
    candidates["eager"] = eager
    return Timing("forward", coordinates, 1, _interleaved(candidates, coordinates, rounds), torch.get_num_threads())


def time_meta_step(
    spec: RuleSpec, *, coordinates: int = META_COORDINATES, steps: int = META_STEPS, rounds: int = ROUNDS
) -> Timing:
    """An unroll and its first-order meta-gradient: fused with recompute, eager through autograd's graph."""
    rule = _random_rule(spec)
    grads = torch.randn(steps + 1, coordinates, generator=torch.Generator().manual_seed(0))
    loss_weights = torch.ones(steps + 1)
    d_updates = grads[1:].flip(0).cumsum(0).flip(0)
    step, weights = eager_step(rule), rule.flat_weights().detach()

    def eager() -> None:
        state, updates = zero_state(rule, coordinates), []
        for grad in grads[:-1]:
            update, state = step(grad, state)
            updates.append(update)
        torch.autograd.grad((d_updates * torch.stack(updates)).sum(), list(rule.parameters()))

    def fused(backend: Backend) -> None:
        stepper = _stepper(backend, spec, weights, grads[0])
        for grad in grads[:-1]:
            stepper(grad)
        backend.unroll_backward(spec, weights, grads, loss_weights, None)

    candidates: dict[str, Callable[[], None]] = {name: partial(fused, get(name)) for name in _working()}
    candidates["eager"] = eager
    best = _interleaved(candidates, coordinates * steps, rounds)
    return Timing("meta-step", coordinates, steps, best, torch.get_num_threads())


def cpu_backends() -> dict[str, str | None]:
    """Every backend but the reference, with the reason why it can't run on the CPU or ``None``."""
    cpu = torch.device("cpu")
    return {name: get(name).unavailable(cpu, torch.float32, RuleSpec()) for name in NAMES if name != "reference"}


def _working() -> list[str]:
    return [name for name, reason in cpu_backends().items() if reason is None]


def _random_rule(spec: RuleSpec) -> CoordinatewiseLSTM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CoordinatewiseLSTM(spec.hidden_size, spec.preprocess, spec.output_scale)


def measure(spec: RuleSpec, coordinates: int = FORWARD_COORDINATES) -> list[Timing]:
    """Forward and meta-step of every backend that works here, and of eager PyTorch.

    Args:
        coordinates: of the forward; the meta-step has at most :data:`META_COORDINATES`.
    """
    meta_coordinates = min(coordinates, META_COORDINATES)
    return [time_forward(spec, coordinates=coordinates), time_meta_step(spec, coordinates=meta_coordinates)]

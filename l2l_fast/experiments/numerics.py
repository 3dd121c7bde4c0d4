"""How far a fused backend is from the exact rule, and how far plain float32 PyTorch is.

Both are measured against the reference in float64 on the same float32 inputs. The weight gradient
is reported block by block: a block with small entries would vanish in the norm of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from l2l_fast import reference
from l2l_fast.backends import Backend, backends, get
from l2l_fast.experiments.progress import progress
from l2l_fast.spec import Identity, LogAndSign, Preprocess, RuleSpec

COORDINATES = 50_000
STEPS = 20  # of the unroll: a million coordinate-steps together

_CHUNK = 5_000  # coordinates at a time where their number has no influence, to save memory

Quantities = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """Errors of one quantity against float64.

    Attributes:
        run: ``"step"`` or ``"unroll"``.
        quantity: what was compared.
        scale: largest magnitude of the float64 values.
        fused: largest error of the backend.
        eager: largest error of float32 PyTorch with autograd.
    """

    run: str
    quantity: str
    scale: float
    fused: float
    eager: float

    @property
    def ratio(self) -> float:
        """Error of the backend relative to eager's, both floored at one float32 rounding of the scale."""
        floor = torch.finfo(torch.float32).eps / 2 * self.scale
        return max(self.fused, floor) / max(self.eager, floor)


@dataclass(frozen=True)
class Comparison:
    """All rows of one backend and one kind of rule."""

    backend: str
    preprocess: Preprocess
    coordinates: int
    steps: int
    rows: list[Row]


def summary(comparison: Comparison) -> Comparison:
    """The same with one row for all blocks of the weight gradient: the block that compares worst with eager."""
    rows: list[Row] = []
    for run in dict.fromkeys(row.run for row in comparison.rows):
        of_run = [row for row in comparison.rows if row.run == run]
        blocks = {f"d_{name}" for name in RuleSpec(preprocess=comparison.preprocess).weight_shapes}
        worst = max((row for row in of_run if row.quantity in blocks), key=lambda row: row.ratio)
        rows += [row for row in of_run if row.quantity not in blocks or row is worst]
    return replace(comparison, rows=rows)


def fused_backends() -> dict[str, str | None]:
    """Every backend but the reference, with the reason why it can't run here or ``None``."""
    return {name: reason for name, reason in backends().items() if name != "reference"}


@dataclass(frozen=True)
class _Inputs:
    spec: RuleSpec
    weights: Tensor  # [P]
    grads: Tensor  # [T + 1, N]
    loss_weights: Tensor  # [T + 1]
    state: Tensor  # [N, 2, 2, H]
    d_update: Tensor  # [N]
    d_state: Tensor  # [N, 2, 2, H]

    def to(self, dtype: torch.dtype) -> _Inputs:
        names = ("weights", "grads", "loss_weights", "state", "d_update", "d_state")
        return _Inputs(self.spec, *(getattr(self, name).to(dtype) for name in names))

    def on(self, device: torch.device) -> _Inputs:
        """What a backend takes on ``device``; the weights of losses stay where they are."""
        names = ("weights", "grads", "state", "d_update", "d_state")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def chunks(self, size: int) -> list[_Inputs]:
        """The same rule on slices of the coordinates."""
        slices = [slice(start, start + size) for start in range(0, self.state.shape[0], size)]
        return [
            replace(
                self,
                grads=self.grads[:, part],
                state=self.state[part],
                d_update=self.d_update[part],
                d_state=self.d_state[part],
            )
            for part in slices
        ]


def _inputs(preprocess: Preprocess, coordinates: int, steps: int, seed: int) -> _Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spec = RuleSpec(preprocess=preprocess)
    bound = spec.hidden_size**-0.5  # as torch.nn.LSTMCell is initialised
    grads = normal(steps + 1, coordinates)
    if isinstance(preprocess, LogAndSign):
        # Magnitudes over eight decades, so that both branches of the preprocessing are taken.
        grads = grads * 10 ** (8 * torch.rand(steps + 1, coordinates, generator=generator) - 7)
    return _Inputs(
        spec,
        weights=bound * (2 * torch.rand(spec.num_weights, generator=generator) - 1),
        grads=grads,
        loss_weights=torch.ones(steps + 1),
        state=0.5 * normal(coordinates, 2, 2, spec.hidden_size).tanh(),
        d_update=normal(coordinates),
        d_state=normal(coordinates, 2, 2, spec.hidden_size),
    )


def _named(spec: RuleSpec, d_weights: Tensor) -> Quantities:
    return {f"d_{name}": block for name, block in reference.split_weights(spec, d_weights).items()}


def _step_by_autograd(inputs: _Inputs) -> Quantities:
    leaves = [inputs.weights.clone(), inputs.grads[0].clone(), inputs.state.clone()]
    weights, grad, state = (leaf.requires_grad_() for leaf in leaves)
    update, new_state = reference.step(inputs.spec, weights, grad, state)
    d_weights, d_grad, d_state = torch.autograd.grad(
        [update, new_state], [weights, grad, state], [inputs.d_update, inputs.d_state]
    )
    return {
        "update": update.detach(),
        "state": new_state.detach(),
        **_named(inputs.spec, d_weights),
        "d_grad": d_grad,
        "d_state": d_state,
    }


def _step_by(backend: Backend, inputs: _Inputs) -> Quantities:
    spec, weights, grad, state = inputs.spec, inputs.weights, inputs.grads[0], inputs.state
    update, new_state = backend.step(spec, weights, grad, state)
    d_weights, d_grad, d_state = backend.step_backward(spec, weights, grad, state, inputs.d_update, inputs.d_state)
    return {"update": update, "state": new_state, **_named(spec, d_weights), "d_grad": d_grad, "d_state": d_state}


def _d_updates(inputs: _Inputs) -> Tensor:
    """Derivatives ``[T, N]`` of the meta-loss by the update of each step: suffix sums of the gradients."""
    weighted = inputs.loss_weights[1:, None] * inputs.grads[1:]
    return weighted.flip(0).cumsum(0).flip(0)


def _recomputed_step(spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`reference.step` without its activations kept: the same bits, but 0.5 GB of memory instead of 1.5."""
    update, state = checkpoint(
        reference.step, spec, weights, grad, state, use_reentrant=False, preserve_rng_state=False
    )
    return update, state


def _unroll_by_autograd(inputs: _Inputs) -> Quantities:
    weights = inputs.weights.clone().requires_grad_()
    start = inputs.state.clone().requires_grad_()
    state, updates = start, []
    step = reference.step if len(start) <= _CHUNK else _recomputed_step
    for grad in inputs.grads[:-1]:
        update, state = step(inputs.spec, weights, grad, state)
        updates.append(update)
    meta_loss = (_d_updates(inputs) * torch.stack(updates)).sum()
    d_weights, d_state = torch.autograd.grad(meta_loss, [weights, start])
    named = _named(inputs.spec, d_weights)
    return {"last update": updates[-1].detach(), "last state": state.detach(), **named, "d_state": d_state}


def _in_chunks(run: Callable[[_Inputs], Quantities], inputs: _Inputs) -> Quantities:
    """``run`` on slices of the coordinates, put together again: for float64, where the order of sums is no matter."""
    parts = [run(chunk) for chunk in inputs.chunks(_CHUNK)]
    per_weight = {f"d_{name}" for name in inputs.spec.weight_shapes}
    return {
        name: sum(values[1:], values[0]) if name in per_weight else torch.cat(values)
        for name, values in ((name, [part[name] for part in parts]) for name in parts[0])
    }


def _unroll_by(backend: Backend, inputs: _Inputs) -> Quantities:
    spec, weights, state = inputs.spec, inputs.weights, inputs.state
    for grad in inputs.grads[:-1]:
        update, state = backend.step(spec, weights, grad, state)
    d_weights, d_state = backend.unroll_backward(spec, weights, inputs.grads, inputs.loss_weights, inputs.state)
    assert d_state is not None
    return {"last update": update, "last state": state, **_named(spec, d_weights), "d_state": d_state}


_RUNS: dict[str, tuple[Callable[[_Inputs], Quantities], Callable[[Backend, _Inputs], Quantities]]] = {
    "step": (_step_by_autograd, _step_by),
    "unroll": (_unroll_by_autograd, _unroll_by),
}


PARTS = 2 * len(_RUNS)


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).abs().max())


def compare(
    backend: str,
    preprocess: Preprocess,
    *,
    coordinates: int = COORDINATES,
    steps: int = STEPS,
    seed: int = 0,
    on_part: Callable[[], None] = lambda: None,
) -> Comparison:
    """Errors of a backend and of float32 PyTorch against float64, for one step and for an unroll.

    The rule has random weights, the gradients are random and the state before the first step is not zero.

    Args:
        on_part: called :data:`PARTS` times, as the work goes on.

    Raises:
        ValueError: if there is no backend of that name.
        RuntimeError: if it can't run here.
    """
    chosen = get(backend)
    inputs = _inputs(preprocess, coordinates, steps, seed)
    device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    reason = chosen.unavailable(device, torch.float32, inputs.spec)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} can't be compared: {reason}")
    rows = []
    for run, (by_autograd, by_backend) in _RUNS.items():
        exact = _in_chunks(by_autograd, inputs.to(torch.float64))
        on_part()
        eager = by_autograd(inputs)
        fused = {name: value.cpu() for name, value in by_backend(chosen, inputs.on(device)).items()}
        on_part()
        rows += [
            Row(run, name, float(value.abs().max()), _error(fused[name], value), _error(eager[name], value))
            for name, value in exact.items()
        ]
    return Comparison(backend, preprocess, coordinates, steps, rows)


PREPROCESSINGS: tuple[Preprocess, ...] = (LogAndSign(), Identity())


def compare_all(
    preprocessings: Sequence[Preprocess] = PREPROCESSINGS, coordinates: int = COORDINATES, steps: int = STEPS
) -> list[Comparison]:
    """:func:`compare` for every fused backend that works here, with each preprocessing."""
    names = [name for name, reason in fused_backends().items() if reason is None]
    with progress("comparing with float64", len(names) * len(preprocessings) * PARTS) as advance:
        return [
            compare(name, preprocess, coordinates=coordinates, steps=steps, on_part=advance)
            for name in names
            for preprocess in preprocessings
        ]

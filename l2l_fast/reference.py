"""The rule in plain PyTorch: the oracle that every other implementation is judged against.

Two rungs. :func:`step` is differentiated by autograd. :func:`step_backward` and
:func:`unroll_backward` are the same derivatives written by hand, symbol for symbol as in
``docs/derivation.md``; fused kernels transcribe them. Arithmetic runs in the dtype of the weights.

Shapes: ``weights [P]`` as laid out by :attr:`RuleSpec.weight_shapes`, ``grad [N]``,
``state [N, 2, 2, H]`` (layer; h, c; unit), ``update [N]``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_fast.spec import LogAndSign, RuleSpec


def split_weights(spec: RuleSpec, weights: Tensor) -> dict[str, Tensor]:
    """Views of the flat vector ``weights [P]``, by name."""
    shapes = spec.weight_shapes
    blocks = torch.split(weights, [math.prod(shape) for shape in shapes.values()])
    return {name: block.view(shape) for (name, shape), block in zip(shapes.items(), blocks, strict=True)}


def features(spec: RuleSpec, grad: Tensor) -> Tensor:
    """Preprocessed gradient ``[N, F]``. A gradient that is not finite becomes NaN in every feature."""
    not_finite = (0 * grad).unsqueeze(-1)  # NaN where the gradient is NaN or infinite, else 0
    if not isinstance(spec.preprocess, LogAndSign):
        return grad.unsqueeze(-1) + not_finite
    p = spec.preprocess.p
    large = grad.abs() >= math.exp(-p)
    # The inner `where` keeps log's infinite slope at 0 out of the backward of the branch not taken.
    log = torch.where(large, grad.abs(), 1.0).log() / p
    x = torch.stack([torch.where(large, log, -1.0), torch.where(large, grad.sign(), grad * math.exp(p))], dim=-1)
    return x + not_finite


class _Cell(NamedTuple):
    """What one LSTM layer computed; every field ``[N, H]``."""

    i: Tensor
    f: Tensor
    g: Tensor
    o: Tensor
    c: Tensor
    tanh_c: Tensor
    h: Tensor


def _cell(x: Tensor, h: Tensor, c: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> _Cell:
    gates = torch.addmm(bias, x, weight_ih.t()) + h @ weight_hh.t()
    i, f, g, o = gates.chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    tanh_c = c.tanh()
    return _Cell(i, f, g, o, c, tanh_c, o * tanh_c)


def _forward(spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, _Cell, _Cell]:
    w = split_weights(spec, weights)
    x = features(spec, grad.to(weights.dtype))
    state = state.to(weights.dtype)
    first = _cell(x, state[:, 0, 0], state[:, 0, 1], w["weight_ih_1"], w["weight_hh_1"], w["bias_1"])
    second = _cell(first.h, state[:, 1, 0], state[:, 1, 1], w["weight_ih_2"], w["weight_hh_2"], w["bias_2"])
    return x, first, second


def step(spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the rule: ``(update [N], new state [N, 2, 2, H])``, both in the dtype of the weights.

    Source: Andrychowicz et al. 2016, section 2.1 and appendix A.
    """
    w = split_weights(spec, weights)
    _, first, second = _forward(spec, weights, grad, state)
    update = spec.output_scale * (second.h @ w["weight_out"] + w["bias_out"])
    return update, torch.stack([first.h, first.c, second.h, second.c], dim=1).view(-1, 2, 2, spec.hidden_size)


def _features_backward(spec: RuleSpec, grad: Tensor, d_x: Tensor) -> Tensor:
    if not isinstance(spec.preprocess, LogAndSign):
        return d_x[:, 0]
    p = spec.preprocess.p
    large = grad.abs() >= math.exp(-p)
    return torch.where(large, d_x[:, 0] / (p * torch.where(large, grad, 1.0)), d_x[:, 1] * math.exp(p))


def _cell_backward(cell: _Cell, c_before: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the four gates before their nonlinearity ``[N, 4H]`` and of the cell before ``[N, H]``."""
    d_c = d_c + d_h * cell.o * (1 - cell.tanh_c**2)
    d_gates = [
        d_c * cell.g * cell.i * (1 - cell.i),
        d_c * c_before * cell.f * (1 - cell.f),
        d_c * cell.i * (1 - cell.g**2),
        d_h * cell.tanh_c * cell.o * (1 - cell.o),
    ]
    return torch.cat(d_gates, dim=1), d_c * cell.f


def step_backward(
    spec: RuleSpec, weights: Tensor, grad: Tensor, state: Tensor, d_update: Tensor, d_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of :func:`step`, the forward recomputed: ``(d_weights [P], d_grad [N], d_state_before)``.

    Args:
        d_update: ``[N]``, derivative by the update.
        d_state: ``[N, 2, 2, H]``, derivative by the new state.
    """
    w = split_weights(spec, weights)
    state = state.to(weights.dtype)
    grad = grad.to(weights.dtype)
    x, first, second = _forward(spec, weights, grad, state)

    d_output = spec.output_scale * d_update
    d_h2 = d_state[:, 1, 0] + torch.outer(d_output, w["weight_out"])
    d_gates_2, d_c2 = _cell_backward(second, state[:, 1, 1], d_h2, d_state[:, 1, 1])
    d_h1 = d_state[:, 0, 0] + d_gates_2 @ w["weight_ih_2"]
    d_gates_1, d_c1 = _cell_backward(first, state[:, 0, 1], d_h1, d_state[:, 0, 1])

    d_weights = {
        "weight_ih_1": d_gates_1.t() @ x,
        "weight_hh_1": d_gates_1.t() @ state[:, 0, 0],
        "bias_1": d_gates_1.sum(0),
        "weight_ih_2": d_gates_2.t() @ first.h,
        "weight_hh_2": d_gates_2.t() @ state[:, 1, 0],
        "bias_2": d_gates_2.sum(0),
        "weight_out": second.h.t() @ d_output,
        "bias_out": d_output.sum().view(1),
    }
    d_state_before = torch.stack([d_gates_1 @ w["weight_hh_1"], d_c1, d_gates_2 @ w["weight_hh_2"], d_c2], dim=1)
    return (
        torch.cat([block.reshape(-1) for block in d_weights.values()]),
        _features_backward(spec, grad, d_gates_1 @ w["weight_ih_1"]),
        d_state_before.view(-1, 2, 2, spec.hidden_size),
    )


def unroll_backward(
    spec: RuleSpec,
    weights: Tensor,
    grads: Tensor,
    loss_weights: Tensor,
    state: Tensor,
    d_points: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """First-order meta-gradient of a whole unroll: ``(d_weights [P], d_state [N, 2, 2, H])``.

    The gradients that enter the LSTM count as constants, so the derivative by the update of step
    ``t`` is ``sum_{s > t} loss_weights[s] * d_points[s]`` and nothing of the optimizee is needed.

    Args:
        grads: ``[T + 1, N]``, gradient of the loss at every point visited, the last one included.
        loss_weights: ``[T + 1]``, weight of each point in the meta-loss.
        state: ``[N, 2, 2, H]``, state before the first step.
        d_points: ``[T + 1, N]``, derivative of each term of the meta-loss by its point; ``None`` if it is ``grads``.

    Source: Andrychowicz et al. 2016, section 2.1 (the dashed edges of figure 2).
    """
    grads, loss_weights = grads.to(weights.dtype), loss_weights.to(weights.dtype)
    d_points = grads if d_points is None else d_points.to(weights.dtype)
    states = [state.to(weights.dtype)]
    for grad in grads[:-2]:
        states.append(step(spec, weights, grad, states[-1])[1])
    d_weights = torch.zeros_like(weights)
    d_update = torch.zeros_like(grads[0])
    d_state = torch.zeros_like(states[0])
    for t in reversed(range(grads.shape[0] - 1)):
        d_update = d_update + loss_weights[t + 1] * d_points[t + 1]
        d_step, _, d_state = step_backward(spec, weights, grads[t], states[t], d_update, d_state)
        d_weights += d_step
    return d_weights, d_state

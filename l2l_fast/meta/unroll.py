"""A rule applied to a batch of problem instances for some steps, differentiable by the rule's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l2l_fast import autograd
from l2l_fast.backends import resolve
from l2l_fast.problems import Instances
from l2l_fast.rule import CoordinatewiseLSTM


@dataclass(frozen=True)
class Unroll:
    """What :func:`unroll` returns. All but ``loss`` is detached, to carry on from.

    Attributes:
        loss: scalar, mean over instances of ``sum_t w_t f(theta_t)``; differentiable.
        losses: ``[steps + 1, batch]``, ``f(theta_t)`` of every instance.
        params: parameters after the last step, shaped as those it started from.
        state: state of the rule after the last step, ``[N, 2, 2, H]`` for a :class:`CoordinatewiseLSTM`.
    """

    loss: Tensor
    losses: Tensor
    params: dict[str, Tensor]
    state: Tensor


class _Layout:
    """Where each named parameter lies in the flat vector of all ``N`` coordinates."""

    def __init__(self, params: Mapping[str, Tensor], rule: nn.Module) -> None:
        _check_params(params, rule)
        self.shapes = {name: tensor.shape for name, tensor in params.items()}
        self.sizes = [tensor.numel() for tensor in params.values()]
        first = next(iter(params.values()))
        self.batch, self.dtype, self.device = first.shape[0], first.dtype, first.device
        self.n = sum(self.sizes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The named parameters as views of ``flat [N]``."""
        blocks = torch.split(flat, self.sizes)
        return {name: block.view(shape) for (name, shape), block in zip(self.shapes.items(), blocks, strict=True)}

    def check_losses(self, losses: Tensor) -> None:
        if losses.shape != (self.batch,):
            raise ValueError(
                f"instances.loss must return one loss per instance, shape ({self.batch},), got {tuple(losses.shape)}"
            )
        if torch.is_grad_enabled() and not losses.requires_grad:
            raise ValueError("instances.loss returned losses that do not depend on the parameters it was given")


def unroll(
    rule: nn.Module,
    instances: Instances,
    steps: int = 20,
    *,
    params: Mapping[str, Tensor] | None = None,
    state: Tensor | None = None,
    generator: torch.Generator | None = None,
    loss_weights: Sequence[float] | Tensor | None = None,
    second_derivatives: bool = False,
    backend: str | None = None,
) -> Unroll:
    """Apply ``rule`` for ``steps`` steps to ``instances``: ``theta_{t+1} = theta_t + update_t``.

    The gradient fed to the rule at ``theta_t`` is that of each instance's own loss, from the same
    minibatch as ``f(theta_t)``. First-order meta-gradients (the default) treat it as a constant;
    with a :class:`CoordinatewiseLSTM` nothing of the instances' graphs is kept then, only ``steps + 1``
    gradients, and not even these if no meta-gradient is wanted (under ``torch.no_grad()``, say).

    Args:
        rule: a :class:`CoordinatewiseLSTM`, or any module with ``init_state(n) -> Tensor`` and
            ``forward(grad [N], state) -> (update [N], state)``.
        params: ``[batch, ...]`` each, where to start; ``None`` is ``instances.init``. Left as they are.
        state: the rule's state at the start, ``[N, 2, 2, H]`` for a :class:`CoordinatewiseLSTM`;
            ``None`` is a fresh one. Left as it is, and must not be changed before the backward.
        generator: source of starting points and minibatches.
        loss_weights: ``[steps + 1]``, the weights ``w_t``; ``None`` is 1 for every step.
        second_derivatives: differentiate through the gradients of the instances as well.
        backend: name of a backend, or ``None`` for the fastest that works.

    Raises:
        TypeError, ValueError: if an argument has the wrong kind, shape, dtype or device.
        RuntimeError: if the named backend can't run this, or in inference mode.

    Source: Andrychowicz et al. 2016, section 2 (equation 3, figure 2).
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive int, got {steps!r}")
    if not (isinstance(rule, nn.Module) and callable(getattr(rule, "init_state", None))):
        raise TypeError(
            f"rule must be a CoordinatewiseLSTM or a module with an init_state(n) method, got {type(rule).__name__}"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError("unroll takes gradients of the instances; use torch.no_grad() instead of inference mode")
    if backend is not None and not isinstance(rule, CoordinatewiseLSTM):
        raise TypeError(f"backend={backend!r} has no meaning for a {type(rule).__name__}; leave it out")
    weights = _as_loss_weights(loss_weights, steps)
    _check_instances(instances, params is None)
    if params is None:
        params = instances.init(generator=generator)
    layout = _Layout(params, rule)
    start = torch.cat([tensor.reshape(-1) for tensor in params.values()])
    if isinstance(rule, CoordinatewiseLSTM):
        if state is not None:
            _check_state(state, rule, layout)
        if not second_derivatives:
            return _fused(rule, instances, layout, start, state, steps, generator, weights, backend)
    return _stepwise(rule, instances, layout, start, state, steps, generator, weights, second_derivatives, backend)


def _fused(
    rule: CoordinatewiseLSTM,
    instances: Instances,
    layout: _Layout,
    start: Tensor,
    state: Tensor | None,
    steps: int,
    generator: torch.Generator | None,
    loss_weights: Tensor,
    backend: str | None,
) -> Unroll:
    """First order: steps in place without a tape, and the backward of the whole segment in one call."""
    weights = rule.flat_weights()
    chosen = resolve(backend, layout.device, layout.dtype, rule.spec)
    prepared = chosen.prepare(rule.spec, weights.detach())
    theta = start.detach().clone()
    packed = (
        chosen.init_state(layout.n, rule.spec, layout.dtype, layout.device)
        if state is None
        else chosen.pack_state(state.detach(), layout.dtype)
    )
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (weights, start, state))
    grads = theta.new_empty(steps + 1 if wanted else 1, layout.n)
    rows = grads.unbind() if wanted else grads.unbind() * steps
    # Leaves that share theta's memory: each step sees the values that the one before it wrote.
    params = {name: view.detach().requires_grad_() for name, view in layout.views(theta).items()}
    leaves = tuple(params.values())
    ones = theta.new_ones(layout.batch)
    losses: list[Tensor] = []

    def evaluate(row: Tensor) -> None:
        loss = instances.loss(params, generator=generator)
        layout.check_losses(loss)
        blocks = torch.autograd.grad(loss, leaves, ones, materialize_grads=True)
        torch.cat([block.reshape(-1) for block in blocks], out=row)
        losses.append(loss.detach())

    with torch.enable_grad():
        for t in range(steps):
            evaluate(rows[t])
            chosen.step_(rule.spec, prepared, [theta], [rows[t]], [packed])
        if wanted:
            evaluate(rows[steps])
    if not wanted:
        with torch.no_grad():
            losses.append(instances.loss(params, generator=generator))

    values = torch.stack(losses)
    loss = _meta_loss(values, loss_weights)
    if wanted:
        per_instance = loss_weights.to(layout.dtype) / layout.batch
        loss = autograd.unroll_loss(rule.spec, loss, weights, start, state, grads, per_instance, chosen.name)
    return Unroll(loss, values, layout.views(theta), chosen.unpack_state(packed, layout.n, rule.spec))


def _stepwise(
    rule: nn.Module,
    instances: Instances,
    layout: _Layout,
    start: Tensor,
    state: Tensor | None,
    steps: int,
    generator: torch.Generator | None,
    loss_weights: Tensor,
    second_derivatives: bool,
    backend: str | None,
) -> Unroll:
    """Step by step through autograd: any rule, with or without second derivatives."""
    advance = _lstm_step(rule, layout, backend) if isinstance(rule, CoordinatewiseLSTM) else rule
    if state is None:
        state = _fresh_state(rule, layout)
    _check_is_tensor(state)
    theta, total = start, None
    ones = start.new_ones(layout.batch)
    losses: list[Tensor] = []
    for t in range(steps + 1):
        tracked = theta.requires_grad  # false until the first update that the meta-gradient reaches
        with torch.enable_grad():
            point = theta if tracked else theta.detach().requires_grad_()
            loss = instances.loss(layout.views(point), generator=generator)
            layout.check_losses(loss)
            if t < steps:
                create_graph = second_derivatives and tracked
                (grad,) = torch.autograd.grad(loss, point, ones, retain_graph=tracked, create_graph=create_graph)
        if tracked:
            term = loss_weights[t].to(loss) * loss.mean()
            total = term if total is None else total + term
        losses.append(loss.detach())
        if t < steps:
            update, state = advance(grad if second_derivatives else grad.detach(), state)
            if update.shape != grad.shape:
                raise ValueError(
                    f"the rule must return an update of shape {tuple(grad.shape)}, not {tuple(update.shape)}"
                )
            _check_is_tensor(state)
            theta = theta + update

    assert state is not None
    values = torch.stack(losses)
    loss = _meta_loss(values, loss_weights)
    if total is not None:
        loss = total + (loss - total.detach())  # also counts the points that no meta-gradient reaches
    return Unroll(loss, values, layout.views(theta.detach()), state.detach())


def _lstm_step(
    rule: CoordinatewiseLSTM, layout: _Layout, backend: str | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The rule as a function, with its weights laid out once for all steps."""
    weights = rule.flat_weights()
    chosen = resolve(backend, layout.device, layout.dtype, rule.spec)
    return lambda grad, state: autograd.step(rule.spec, weights, grad, state, chosen.name)


def _fresh_state(rule: nn.Module, layout: _Layout) -> Tensor:
    if isinstance(rule, CoordinatewiseLSTM):
        return rule.init_state(layout.n, device=layout.device, dtype=layout.dtype)
    state: Tensor = rule.init_state(layout.n)  # type: ignore[operator]  # checked by unroll
    return state


def _meta_loss(losses: Tensor, loss_weights: Tensor) -> Tensor:
    """Mean over instances of the weighted sum over steps."""
    return torch.mv(losses.t(), loss_weights.to(losses)).mean()


def _as_loss_weights(loss_weights: Sequence[float] | Tensor | None, steps: int) -> Tensor:
    """``[steps + 1]`` in float64 on the CPU."""
    if loss_weights is None:
        return torch.ones(steps + 1, dtype=torch.float64, device="cpu")
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
    return weights


def _check_instances(instances: Instances, need_init: bool) -> None:
    if isinstance(instances, type) or not all(
        callable(getattr(instances, name, None)) for name in (("init", "loss") if need_init else ("loss",))
    ):
        raise TypeError(
            f"instances must be an object with the methods init and loss, got {type(instances).__name__}; "
            "if that is a problem, pass problem.sample(batch_size, ...)"
        )


def _check_params(params: Mapping[str, Tensor], rule: nn.Module) -> None:
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a dict of tensors, got {type(params).__name__}")
    if not params:
        raise ValueError("params is empty; give at least one tensor by name")
    first_name, first = next(iter(params.items()))
    weight = next((p for p in rule.parameters() if p.is_floating_point()), None)
    for name, tensor in params.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            raise TypeError(f"params[{name!r}] must be a dense tensor of real floating point, got {_describe(tensor)}")
        if tensor.dim() == 0 or tensor.shape[0] != first.shape[0] or tensor.shape[0] == 0:
            raise ValueError(
                f"params[{name!r}] must have the instances as leading dimension, like params[{first_name!r}] of shape "
                f"{tuple(first.shape)}, got shape {tuple(tensor.shape)}"
            )
        for owner, other in ((f"params[{first_name!r}]", first), ("the rule", weight)):
            if other is not None and tensor.dtype != other.dtype:
                raise TypeError(
                    f"params[{name!r}] is {tensor.dtype} but {owner} is {other.dtype}; convert one of them with .to()"
                )
            if other is not None and tensor.device != other.device:
                raise ValueError(
                    f"params[{name!r}] is on {tensor.device} but {owner} is on {other.device}; move one with .to()"
                )
    if not math.prod(first.shape):
        raise ValueError(f"params[{first_name!r}] has no coordinates: shape {tuple(first.shape)}")


def _check_is_tensor(state: object) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(
            f"the state of a rule must be one tensor, got {type(state).__name__}; concatenate what it consists of"
        )


def _check_state(state: Tensor, rule: CoordinatewiseLSTM, layout: _Layout) -> None:
    expected = (layout.n, 2, 2, rule.spec.hidden_size)
    if not isinstance(state, Tensor):
        raise TypeError(f"state must be a tensor, got {type(state).__name__}")
    if tuple(state.shape) != expected:
        raise ValueError(
            f"state must have shape {expected} for {layout.n} coordinates, got {tuple(state.shape)}; "
            "take it from the run before, or leave it out for a fresh one"
        )
    if state.dtype != layout.dtype:
        raise TypeError(f"state is {state.dtype} but the parameters are {layout.dtype}; convert one of them with .to()")
    if state.device != layout.device:
        raise ValueError(f"state is on {state.device} but the parameters are on {layout.device}; move one with .to()")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with layout {value.layout}"
    return type(value).__name__

"""Why a rule does not learn: what it is fed, what it does, and what its training sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_fast import reference
from l2l_fast.meta.objective import Objective
from l2l_fast.meta.unroll import unroll
from l2l_fast.meta.validation import affordable_functions
from l2l_fast.problems import Instances, Problem
from l2l_fast.rule import CoordinatewiseLSTM

SATURATED = 0.01  # within this share of its range of either end, a gate passes next to no gradient
BINS = 20

FUNCTIONS = 64
COORDINATES = 2**15  # of all instances, unless their number is given
WATCHED = 2048  # coordinates whose gates and features are looked at

# Where the verdict draws its lines.
_LITTLE_FALL = 0.01
_FEW_DOWNHILL = 0.05
_STEP_TOO_LONG, _STEP_TOO_SHORT = 1.0, 1e-4
_MANY_SATURATED, _SOME_SATURATED = 0.5, 0.1
_LARGE_FEATURE = 10.0
_GRADIENT_RATIO = 100.0


@dataclass(frozen=True)
class Histogram:
    """Distribution of one feature over the coordinates watched; gradients that are not finite are left out.

    Attributes:
        edges: ``[BINS + 1]``.
        counts: ``[BINS]``.
    """

    edges: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` measured.

    Attributes:
        losses: ``[steps + 1]``, mean over instances of ``f(theta_t)``.
        cosine: ``[steps]``, mean over instances of the cosine between update and negative gradient.
        relative_update: ``[steps]``, mean over instances of ``|update| / |theta|``.
        saturation: share of gate values near either end of their range, by layer and gate (``"1.f"``), in the
            coordinates watched: 2048, evenly spaced, or all.
        features: a histogram per feature.
        meta_gradient_norms: ``[segments]``, norm of the meta-gradient of each segment of the run.
    """

    losses: Tensor
    cosine: Tensor
    relative_update: Tensor
    saturation: dict[str, float]
    features: tuple[Histogram, ...]
    meta_gradient_norms: Tensor

    def verdict(self) -> str:
        """What stands out, one finding per line, with what to try."""
        findings = [*self._about_losses(), *self._about_updates(), *self._about_inputs(), *self._about_training()]
        return "\n".join(findings) if findings else "Nothing out of the ordinary."

    def _about_losses(self) -> list[str]:
        first, last = self.losses[0].item(), self.losses[-1].item()
        if not self.losses.isfinite().all():
            return ["The runs diverge to values that are not finite: try a smaller output_scale or a lower lr."]
        seen = f"{first:.5g} at the start, {last:.5g} at the end"
        if last >= first:
            return [f"The loss does not fall: {seen}."]
        if first - last < _LITTLE_FALL * abs(first):
            return [f"The loss hardly falls: {seen}. After training, train longer or with another lr."]
        return []

    def _about_updates(self) -> list[str]:
        findings = []
        cosine, relative = self.cosine.mean().item(), self.relative_update.median().item()
        if cosine < _FEW_DOWNHILL:
            findings.append(
                f"Updates hardly point downhill: the mean cosine with the negative gradient is {cosine:.2f}. "
                "That is normal before training; afterwards, train longer or with another lr."
            )
        if relative > _STEP_TOO_LONG:
            findings.append(f"Updates are {relative:.2g} times as long as the parameters: try a smaller output_scale.")
        elif relative < _STEP_TOO_SHORT:
            findings.append(
                f"Updates are only {relative:.2g} times as long as the parameters: try a larger output_scale."
            )
        return findings

    def _about_inputs(self) -> list[str]:
        findings = [
            f"Gate {name} is saturated in {share:.0%} of its values, so little is learned through it: "
            "try preprocess=LogAndSign() or a fresh start."
            for name, share in self.saturation.items()
            if share > _MANY_SATURATED
        ]
        # Features enter the first layer; however large, they do no harm where the rule has learned to scale them down.
        saturated = any(share > _SOME_SATURATED for name, share in self.saturation.items() if name.startswith("1."))
        for index, histogram in enumerate(self.features):
            largest = histogram.edges.abs().max().item()
            if saturated and largest > _LARGE_FEATURE:
                findings.append(
                    f"Feature {index} reaches {largest:.3g}, which drives gates to their limits: "
                    "try preprocess=LogAndSign() or scale the problem."
                )
        return findings

    def _about_training(self) -> list[str]:
        norms = self.meta_gradient_norms
        if not norms.isfinite().all():
            return ["The meta-gradient is not finite: try a shorter truncation or a smaller output_scale."]
        smallest, largest = norms.min().item(), norms.max().item()
        if largest == 0:
            return ["The meta-gradient is zero: the loss does not depend on the rule."]
        if largest > _GRADIENT_RATIO * smallest:
            return [
                f"The meta-gradient ranges from {smallest:.2g} to {largest:.2g} over the segments of a run, "
                "so a few segments decide: set clip, or weigh steps by loss_weights."
            ]
        return []


def diagnose(
    rule: CoordinatewiseLSTM,
    problem: Problem,
    *,
    steps: int = 100,
    truncation: int = 20,
    functions: int | None = None,
    seed: int = 0,
    second_derivatives: bool = False,
    slope_floor: float = 0.0,
    objective: Objective = "loss",
    loss_weights: Sequence[float] | None = None,
) -> Diagnosis:
    """Watch ``rule`` for ``steps`` steps on ``functions`` instances; it stays as it is.

    Args:
        functions: ``None`` is 64, or as many as have 32 768 coordinates, but at least 1.
        truncation: steps of a segment, as in training.
        seed: of the instances.
        second_derivatives, slope_floor, objective: of the meta-gradients, as in training, see :func:`unroll`.
        loss_weights: ``[steps + 1]``, as in training; ``None`` is 1 for every step.

    Raises:
        TypeError: if the rule is not a :class:`CoordinatewiseLSTM`.
        ValueError: if a number is not positive.
    """
    if not isinstance(rule, CoordinatewiseLSTM):
        raise TypeError(f"rule must be a CoordinatewiseLSTM, got {type(rule).__name__}")
    for name, value in (("steps", steps), ("truncation", truncation), ("functions", functions)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    device = rule.output.weight.device
    if functions is None:
        functions = affordable_functions(rule, problem, device, most=FUNCTIONS, coordinates=COORDINATES, least=1)
    generator = torch.Generator().manual_seed(seed)
    instances = problem.sample(functions, generator=generator, device=device)
    here = generator.get_state()
    observed = _observe(rule, instances, steps, generator)
    generator.set_state(here)
    loss_weights = [1.0] * (steps + 1) if loss_weights is None else loss_weights
    norms = _meta_gradient_norms(
        rule, instances, steps, truncation, generator, second_derivatives, slope_floor, objective, loss_weights
    )
    return Diagnosis(*observed, norms)


def _observe(
    rule: CoordinatewiseLSTM, instances: Instances, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, dict[str, float], tuple[Histogram, ...]]:
    """All but the meta-gradients; gates and features by the reference implementation."""
    spec, weights = rule.spec, rule.flat_weights().detach()
    params = instances.init(generator=generator)
    batch = next(iter(params.values())).shape[0]
    n = sum(p.numel() for p in params.values())
    state = rule.init_state(n, dtype=weights.dtype)
    watched = torch.linspace(0, n - 1, min(n, WATCHED), dtype=torch.float64, device=state.device).round().long()
    losses, cosines, relative, features = [], [], [], []
    saturated: dict[str, list[Tensor]] = {}
    for _ in range(steps):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
        loss = instances.loss(leaves, generator=generator)
        blocks = torch.autograd.grad(loss.sum(), list(leaves.values()), materialize_grads=True)
        grad = torch.cat([block.reshape(-1) for block in blocks])
        x, *cells = reference._forward(spec, weights, grad[watched], state[watched])
        with torch.no_grad():
            update, state = rule(grad, state)
        for layer, cell in enumerate(cells, start=1):
            for gate in ("i", "f", "o"):
                near_end = (getattr(cell, gate) - 0.5).abs() > 0.5 - SATURATED
                saturated.setdefault(f"{layer}.{gate}", []).append(near_end.float().mean())
            saturated.setdefault(f"{layer}.g", []).append((cell.g.abs() > 1 - 2 * SATURATED).float().mean())
        steps_by_name = dict(zip(params, torch.split(update, [p.numel() for p in params.values()]), strict=True))
        u = _by_instance({name: steps_by_name[name].view(p.shape) for name, p in params.items()}, batch)
        g = _by_instance(dict(zip(params, blocks, strict=True)), batch)
        losses.append(loss.detach().mean())
        cosines.append(torch.cosine_similarity(u, -g, dim=1).mean())
        relative.append((u.norm(dim=1) / _by_instance(params, batch).norm(dim=1)).mean())
        features.append(x)
        params = {name: p.detach() + steps_by_name[name].view(p.shape) for name, p in params.items()}
    with torch.no_grad():
        losses.append(instances.loss(params, generator=generator).mean())
    return (
        torch.stack(losses),
        torch.stack(cosines),
        torch.stack(relative),
        {name: torch.stack(shares).mean().item() for name, shares in saturated.items()},
        tuple(_histogram(column) for column in torch.cat(features).unbind(1)),
    )


def _meta_gradient_norms(
    rule: CoordinatewiseLSTM,
    instances: Instances,
    steps: int,
    truncation: int,
    generator: torch.Generator,
    second_derivatives: bool,
    slope_floor: float,
    objective: Objective,
    loss_weights: Sequence[float],
) -> Tensor:
    norms, params, state = [], None, None
    weights = list(rule.parameters())
    for start in range(0, steps, truncation):
        run = unroll(
            rule,
            instances,
            min(truncation, steps - start),
            params=params,
            state=state,
            generator=generator,
            loss_weights=loss_weights[start : start + truncation + 1],
            objective=objective,
            second_derivatives=second_derivatives,
            slope_floor=slope_floor,
        )
        norms.append(torch.nn.utils.get_total_norm(torch.autograd.grad(run.loss, weights)))
        params, state = run.params, run.state
    return torch.stack(norms)


def _by_instance(tensors: dict[str, Tensor], batch: int) -> Tensor:
    """``[batch, coordinates of an instance]``."""
    return torch.cat([tensor.reshape(batch, -1) for tensor in tensors.values()], dim=1)


def _histogram(values: Tensor) -> Histogram:
    values = values[values.isfinite()].cpu().float()
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return Histogram(torch.linspace(low, high, BINS + 1), torch.histc(values, BINS, low, high))

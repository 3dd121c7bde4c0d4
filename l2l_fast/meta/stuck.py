"""Why a training does not get off the ground: looked for as soon as validations show that it does not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from l2l_fast.meta.config import TrainConfig
from l2l_fast.meta.layout import Layout
from l2l_fast.meta.log import LogRow
from l2l_fast.meta.point import Point
from l2l_fast.meta.unroll import unroll
from l2l_fast.problems import Problem

VALIDATIONS = 2  # after which a loss that hardly falls is looked into

_LITTLE_FALL = 0.01  # of the loss of the untrained rule
_VANISHED = 0.05  # of the meta-gradients before
_FLAT = 1e-2  # of a coordinate's gradient at the start of a run
_MANY_FLAT = 0.5
_INSTANCES = 4


def why_stuck(
    history: Sequence[LogRow], rule: nn.Module, problem: Problem, config: TrainConfig, device: torch.device
) -> str | None:
    """What keeps ``rule`` from learning, in a sentence or two with what to try; ``None`` if it learns.

    Args:
        history: a row per validation, the first one of the untrained rule.
    """
    untrained, last = history[0].validation_loss, history[-1]
    if len(history) <= VALIDATIONS or untrained - last.best_validation_loss > _LITTLE_FALL * abs(untrained):
        return None
    seen = (
        f"after {last.update} updates the validation loss is {last.validation_loss:.4g}, and that of the untrained "
        f"rule {untrained:.4g}"
    )
    share = flat_share(rule, problem, config, device)
    if share > _MANY_FLAT:
        return (
            f"{seen}: the rule's updates drive the problem to where nothing is learned. {share:.0%} of its coordinates "
            "have lost their gradient at the end of a run, as saturated units do. Start afresh with another seed, with "
            "mirrored runs for longer (mirrored), a lower lr or a smaller output_scale"
        )
    norms = [row.grad_norm for row in history if row.grad_norm is not None]
    if norms and norms[-1] <= _VANISHED * max(norms) > 0:
        return (
            f"{seen}: the meta-gradient has vanished, from a norm of {max(norms):.2g} to {norms[-1]:.2g}. Start afresh "
            "with another seed, a lower lr or a smaller output_scale"
        )
    return (
        f"{seen}. If no optimizer can lower this loss, look at the problem; otherwise train longer, or with another lr "
        "or output_scale"
    )


def flat_share(rule: nn.Module, problem: Problem, config: TrainConfig, device: torch.device) -> float:
    """Share of the coordinates whose gradient all but vanishes during a validation run, of those that have one."""
    generator = torch.Generator().manual_seed(config.validation_seed)
    instances = problem.sample(_INSTANCES, generator=generator, device=device)
    params = instances.init(generator=generator)
    layout = Layout(params, rule)
    here = generator.get_state()
    with torch.no_grad():
        run = unroll(rule, instances, config.horizon, params=params, generator=generator, backend=config.backend)
    sizes = []
    for place in (params, run.params):
        theta = torch.cat([tensor.detach().reshape(-1) for tensor in place.values()])
        grad = torch.empty_like(theta)
        generator.set_state(here)  # the same minibatch
        with torch.enable_grad():
            Point(layout, theta).evaluate(lambda params: instances.loss(params, generator=generator), out=grad)
        sizes.append(grad.abs())
    first, last = sizes
    alive = first > 0
    # A gradient that is not finite is another fault.
    return float((last[alive] < _FLAT * first[alive]).double().mean()) if alive.any() else 0.0

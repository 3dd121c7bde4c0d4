"""Why a training does not get off the ground: looked for as soon as validations show that it does not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from l2l_fast.meta.config import TrainConfig
from l2l_fast.meta.layout import Layout
from l2l_fast.meta.log import LogRow
from l2l_fast.meta.point import Point
from l2l_fast.meta.unroll import unroll
from l2l_fast.problems import Problem

VALIDATIONS = 2  # after which runs that lead nowhere are looked into

LITTLE_FALL = 0.02  # of the loss that runs start from
_VANISHED = 0.05  # of the meta-gradients before
_FLAT = 1e-2  # of a coordinate's gradient at the start of a run
_MANY_FLAT = 0.5
_INSTANCES = 4


def leads_nowhere(losses: Tensor) -> bool:
    """Whether runs with ``losses [T + 1, batch]`` end about as high as they start, or worse."""
    first, last = losses[0].double().mean(), losses[-1].double().mean()
    return not last.isfinite() or bool(first - last <= LITTLE_FALL * first.abs())


def why_stuck(
    history: Sequence[LogRow],
    losses: Tensor,
    rule: nn.Module,
    problem: Problem,
    config: TrainConfig,
    device: torch.device,
) -> str | None:
    """What keeps ``rule`` from learning, in a few words with what to try; ``None`` if its runs lead somewhere.

    Args:
        history: a row per validation, the first one before training.
        losses: ``[T + 1, batch]``, those of the last validation.
    """
    if len(history) <= VALIDATIONS or not leads_nowhere(losses):
        return None
    first, last = losses[0].double(), losses[-1].double()
    if not last.isfinite().all():
        return "the runs of the rule diverge to losses that are not finite; lower lr or output_scale"
    fall = first - last
    seen = (
        f"after {history[-1].update} updates its runs still lead nowhere: the loss is {first.mean():.5g} at their "
        f"start and {last.mean():.5g} at their end"
    )
    noise = 2 * fall.std(correction=0).item() / math.sqrt(len(fall))
    share = flat_share(rule, problem, config, device) if fall.mean() <= noise else 0.0
    if share > _MANY_FLAT:
        mirrored = "" if config.mirrored == 1 else "more mirrored runs at the beginning (mirrored), "
        return (
            f"{seen}. {share:.0%} of the coordinates have lost their gradient by then, as where units are saturated, "
            f"so nothing is learned. Start afresh with {mirrored}another seed, a lower lr or a smaller output_scale"
        )
    norms = [row.grad_norm for row in history if row.grad_norm is not None]
    before = statistics.median(norms[:-1]) if len(norms) > 1 else 0.0
    if before > 0 and norms[-1] <= _VANISHED * before:
        return (
            f"{seen}. The meta-gradient has vanished, from a norm of {before:.2g} to {norms[-1]:.2g}. Start afresh "
            "with another seed, a lower lr or a smaller output_scale"
        )
    return (
        f"{seen}. If no optimizer can lower this loss by much, look at the problem; otherwise train longer, or with "
        "another lr or output_scale"
    )


def flat_share(rule: nn.Module, problem: Problem, config: TrainConfig, device: torch.device) -> float:
    """Share of the coordinates whose gradient all but vanishes during a run, of those that have one at its start."""
    generator = torch.Generator().manual_seed(config.validation_seed)
    instances = problem.sample(min(_INSTANCES, config.validation_functions or 1), generator=generator, device=device)
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
    return float((last[alive] < _FLAT * first[alive]).double().mean()) if alive.any() else 0.0

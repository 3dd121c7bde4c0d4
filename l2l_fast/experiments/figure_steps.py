"""Appendix B of Andrychowicz et al. 2016: the update that an optimizer proposes, as a function of the gradient."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from l2l_fast.baselines import BASELINES, Tuned
from l2l_fast.experiments.figures import COLOURS, LABELS, new_figure, style, write_figure
from l2l_fast.experiments.progress import progress
from l2l_fast.meta.layout import Layout
from l2l_fast.problems import Instances, Problem
from l2l_fast.rule import CoordinatewiseLSTM

SEED = 2**31 + 4  # next to the one of evaluation
AT_STEPS = (1, 10, 40, 90)
COMPARED = ("sgd", "adam")

_GRADIENTS = 201  # points of a curve
_MARGIN = 1.25  # how far curves and axes go beyond the largest value in the run


@dataclass(frozen=True)
class Trace:
    """What happened in one run of a rule.

    Attributes:
        layout: of the coordinates.
        grads: ``[steps, N]``, gradients at every step.
        states: ``[N, 2, 2, H]`` each, states of the rule before a step, by its number.
    """

    layout: Layout
    grads: Tensor
    states: dict[int, Tensor]


@dataclass(frozen=True)
class Response:
    """Updates proposed to one coordinate at one step, its past being that of the run.

    Attributes:
        coordinate: its name, such as ``w1[300, 5]``.
        step: which.
        gradient: that of the run.
        gradients: ``[points]``, gradients that the coordinate might have had instead.
        updates: ``[points]`` each, what an optimizer makes of them, by its name.
    """

    coordinate: str
    step: int
    gradient: float
    gradients: Tensor
    updates: dict[str, Tensor]


@torch.no_grad()
def trace(
    rule: CoordinatewiseLSTM, instances: Instances, steps: int, at: Sequence[int], generator: torch.Generator
) -> Trace:
    """Run ``rule`` and keep its states before the steps ``at``."""
    params = instances.init(generator=generator)
    layout = Layout(params, rule)
    theta = torch.cat([param.reshape(-1) for param in params.values()])
    state = rule.init_state(layout.n)
    grads = theta.new_empty(steps, layout.n)
    states = {}
    with progress("running the rule", steps) as advance:
        for step in range(steps):
            if step in at:
                states[step] = state
            leaves = {name: view.detach().requires_grad_() for name, view in layout.views(theta).items()}
            with torch.enable_grad():
                loss = instances.loss(leaves, generator=generator).sum()
            layout.gather(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), out=grads[step])
            update, state = rule(grads[step], state)
            theta = theta + update
            advance()
    return Trace(layout, grads, states)


def pick_coordinates(traced: Trace) -> dict[str, int]:
    """Coordinates worth a look: of the first and the last matrix, those with the largest and with a median gradient.

    Returns:
        Their places in the flat vector by name; coordinates whose gradient is always zero are left out.
    """
    rms = traced.layout.views(traced.grads.square().mean(dim=0).sqrt())
    matrices = [name for name, view in rms.items() if view.dim() > 2]
    starts = dict(zip(rms, itertools.accumulate([0, *traced.layout.sizes]), strict=False))
    picked = {}
    for name in dict.fromkeys((matrices[0], matrices[-1])):
        size = rms[name].flatten()
        live = size.nonzero().flatten()
        order = live[size[live].argsort()]
        for place in (order[-1], order[len(order) // 2]):
            index = torch.unravel_index(place, rms[name].shape[1:])
            picked[f"{name}[{', '.join(str(int(i)) for i in index)}]"] = starts[name] + int(place)
    return picked


@torch.no_grad()
def respond(
    rule: CoordinatewiseLSTM, baselines: Mapping[str, Tuned], traced: Trace, coordinate: str, place: int
) -> list[Response]:
    """What ``rule`` and baselines that had followed the same run propose, at each step whose state was kept."""
    past = traced.grads[:, place]
    reach = _MARGIN * float(past.abs().max())
    gradients = reach * torch.linspace(-1, 1, _GRADIENTS) ** 3  # dense where a rule that sees logarithms reacts
    responses = []
    for step, states in traced.states.items():
        updates = {"lstm": rule(gradients, states[place].expand(_GRADIENTS, -1, -1, -1))[0]}
        for name, tuned in baselines.items():
            updates[name] = _baseline_update(name, tuned.lr, past[:step], gradients)
        responses.append(Response(coordinate, step, float(past[step]), gradients, updates))
    return responses


def _baseline_update(name: str, lr: float, past: Tensor, gradients: Tensor) -> Tensor:
    """The update for each of ``gradients``, after the gradients ``past``."""
    theta = torch.zeros_like(gradients, requires_grad=True)
    optimizer = BASELINES[name]([theta], lr)
    for gradient in (*past, gradients):
        before = theta.detach().clone()
        theta.grad = gradient.expand_as(theta).clone()
        optimizer.step()
    return theta.detach() - before


def responses(
    rule: CoordinatewiseLSTM, baselines: Mapping[str, Tuned], problem: Problem, at: Sequence[int] = AT_STEPS
) -> list[Response]:
    """Of a few coordinates at the steps ``at`` of one run on ``problem``."""
    generator = torch.Generator().manual_seed(SEED)
    instances = problem.sample(1, generator=generator, device=generator.device)
    traced = trace(rule, instances, max(at) + 1, at, generator)
    return [
        response
        for coordinate, place in pick_coordinates(traced).items()
        for response in respond(rule, baselines, traced, coordinate, place)
    ]


def responses_figure(found: Sequence[Response]) -> Figure:
    """A row of panels for each coordinate, a column for each step; dots are the gradients of the run."""
    coordinates = list(dict.fromkeys(response.coordinate for response in found))
    steps = list(dict.fromkeys(response.step for response in found))
    figure = new_figure(2.9 * len(steps) + 0.8, 2.3 * len(coordinates) + 0.7)
    panels = figure.subplots(len(coordinates), len(steps), sharex="row", sharey="row", squeeze=False)
    for response in found:
        row, column = coordinates.index(response.coordinate), steps.index(response.step)
        axes = panels[row, column]
        for name, update in response.updates.items():
            learned = name == "lstm"
            axes.plot(
                response.gradients,
                update,
                color=COLOURS[name],
                linestyle="-" if learned else "--",
                linewidth=2.2 if learned else 1.5,
                zorder=3 if learned else 2,
                label=LABELS[name],
            )
        nearest = int((response.gradients - response.gradient).abs().argmin())
        axes.plot(
            response.gradient, response.updates["lstm"][nearest], "o", color=COLOURS["lstm"], markersize=5, zorder=4
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(4))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        style(axes)
        if row == 0:
            axes.set_title(f"step {response.step}", fontsize=11)
        if column == 0:
            axes.set_ylabel(f"{response.coordinate}\nupdate")
        if row == len(coordinates) - 1:
            axes.set_xlabel("gradient")
    for row, coordinate in enumerate(coordinates):
        # A line may leave the panel: that of SGD is straight, and often so steep that it would hide all others.
        largest = max(
            float(update.abs().max())
            for response in found
            for name, update in response.updates.items()
            if response.coordinate == coordinate and name != "sgd"
        )
        panels[row, 0].set_ylim(-_MARGIN * largest, _MARGIN * largest)
    figure.align_ylabels(panels[:, 0])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncol=len(labels), frameon=False)
    return figure


def write_steps_figure(folder: Path, found: Sequence[Response], baselines: Mapping[str, Tuned]) -> list[Path]:
    """The picture, its curves and what belongs to them.

    Returns:
        The files written.

    Raises:
        OSError: if they can't be written.

    Source: Andrychowicz et al. 2016, appendix B.
    """
    names = list(found[0].updates)
    rows = [
        [response.coordinate, response.step, gradient, *updates]
        for response in found
        for gradient, *updates in zip(
            response.gradients.tolist(), *(response.updates[name].tolist() for name in names), strict=True
        )
    ]
    return write_figure(
        folder,
        "steps",
        responses_figure(found),
        ["coordinate", "step", "gradient", *names],
        rows,
        {
            "seed": SEED,
            "baselines": {name: {"lr": tuned.lr} for name, tuned in baselines.items()},
            "gradients_of_the_run": [
                {"coordinate": response.coordinate, "step": response.step, "gradient": response.gradient}
                for response in found
            ],
        },
    )

"""A step of the inner loop as a CUDA graph: for a small network many small launches become one and a few copies.

A graph runs again what the device did while it was captured, on the same memory, and nothing of what the host did. So
all that changes from one step to the next, or from one meta-update to the next, is copied to where the graph reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l2l_fast.backends import Backend
from l2l_fast.meta.checkpoint import describe_problem
from l2l_fast.meta.layout import Layout
from l2l_fast.meta.point import Point
from l2l_fast.problems import HeldOut, Instances, Problem, Replayable
from l2l_fast.rule import CoordinatewiseLSTM
from l2l_fast.spec import RuleSpec

_DEVICE_TYPE = "cuda"
_WARM_UP = 3  # steps before the capture: they compile kernels, and allocate what a graph can't


class StepGraph:
    """Losses, their gradient and the rule's step; captured when they are first asked for, and the same from then on.

    It serves unrolls of rules of one specification, on instances of one problem in batches of one size. Another problem
    of the same shapes is noticed if its instances are of another class, or name it in an attribute ``problem``. A copy
    captures anew.
    """

    def __init__(self) -> None:
        self._kind: object = None  # what it was captured for

    def __reduce__(self) -> tuple[type[StepGraph], tuple[()]]:
        return StepGraph, ()

    def begin(
        self,
        backend: Backend,
        spec: RuleSpec,
        weights: Tensor,
        instances: Replayable,
        layout: Layout,
        theta: Tensor,
        packed: Tensor,
        drawn: Mapping[str, Tensor],
    ) -> None:
        """Go to the point ``theta [N]`` and the packed state there, with these weights.

        Args:
            theta: copied, as ``packed`` is.
            drawn: what the instances have drawn for the first step, which a capture is made with.

        Raises:
            ValueError: if the step was captured for something else, or the losses draw random numbers.
            TypeError: if what was drawn is not tensors by name.
            RuntimeError: if the losses can't be captured.
        """
        # The order of the names is that of the coordinates, which dictionaries compare equal without.
        shapes, problem = tuple(layout.shapes.items()), getattr(instances, "problem", None)
        kind = backend.name, spec, shapes, layout.dtype, layout.device, type(instances), describe_problem(problem)
        if self._kind is None:
            # All that the graph reads or writes outlives it here, the data of the instances among it.
            self._backend, self._spec, self._instances = backend, spec, instances
            self._prepared: Any = backend.prepare(spec, weights)
            self._theta, self._packed = theta.clone(), packed.clone()
            self._point = Point(layout, self._theta)
            self._drawn_kinds = _kinds(drawn)
            self._drawn = {name: tensor.detach().clone() for name, tensor in drawn.items()}
            self._grad = torch.empty_like(theta)
            self._losses: Tensor  # those of the capture, where each replay writes its own
            self._graph = capture(self._work, layout.device)
            self._kind = kind
        elif kind != self._kind:
            raise ValueError(f"this graph was captured for {self._kind}, not for {kind}; give each its own StepGraph")
        self._prepared = backend.renew(spec, self._prepared, weights)
        self._theta.copy_(theta)
        self._packed.copy_(packed)

    def _work(self) -> None:
        self._losses = self._point.evaluate(lambda params: self._instances.loss_of(params, self._drawn), out=self._grad)
        self._backend.step_(self._spec, self._prepared, [self._theta], [self._grad], [self._packed])

    def place(self) -> tuple[Tensor, Tensor]:
        """Copies of the point and the packed state."""
        return self._theta.clone(), self._packed.clone()

    @torch.no_grad()
    def take(self, drawn: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """Take a step; returns the losses ``[batch]`` before it, whose gradient is written to ``out [N]``.

        Raises:
            ValueError: if ``drawn`` is of another kind than what the step was captured with.
        """
        found = _kinds(drawn)
        if found != self._drawn_kinds:
            raise ValueError(
                f"instances.draw must return tensors of the same names, shapes, dtypes and devices each time; it once "
                f"gave {self._drawn_kinds} and now {found}"
            )
        for name, tensor in drawn.items():
            self._drawn[name].copy_(tensor)
        self._graph.replay()
        out.copy_(self._grad)
        return self._losses.clone()


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    if not (isinstance(tensors, Mapping) and all(isinstance(tensor, Tensor) for tensor in tensors.values())):
        raise TypeError(f"instances.draw must return a dictionary of tensors by name, got {tensors!r}")
    return {name: (tuple(tensor.shape), tensor.dtype, str(tensor.device)) for name, tensor in tensors.items()}


def capture(work: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """What ``work`` does on ``device`` as a graph; ``work`` runs some times before, for what only a first run does.

    Raises:
        ValueError: if ``work`` draws random numbers.
        RuntimeError: if ``work`` does what a graph can't hold.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        sources = _random_states(device)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        if not all(map(torch.equal, sources, _random_states(device))):
            # A device captures them without an error, and replays others than were asked for.
            raise ValueError(
                "loss_of of these instances draws random numbers, which a CUDA graph would not take from the generator "
                "of the run; draw them in draw, or leave cuda_graph out"
            )
        graph, first = torch.cuda.CUDAGraph(), None
        try:
            # Outside, for a capture that fails to end leaves its stream the current one.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
                try:
                    work()
                except BaseException as error:
                    first = error  # for which the end of the capture raises one more
                    raise
        except RuntimeError as error:
            first = first or error
            if isinstance(first, torch.OutOfMemoryError) or not isinstance(first, RuntimeError):
                raise first from None
            raise RuntimeError(
                "a step on these instances can't be captured as a CUDA graph; their loss_of must not wait for the "
                f"device ({first}). Leave cuda_graph out to train without a graph"
            ) from first
        finally:
            del first  # whose frames hold what was allocated: this one must not be among them
    return graph


def _random_states(device: torch.device) -> list[Tensor]:
    """Of the generators that are used where none is named."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def check_capturable(rule: nn.Module, instances: Instances) -> None:
    """Make sure that a graph can hold steps of ``rule`` on ``instances``.

    Raises:
        TypeError: if the rule or the instances are of a kind that it can't hold.
        ValueError: if the rule is not on a CUDA device.
    """
    _check_rule(rule)
    if not isinstance(instances, Replayable):
        raise TypeError(
            f"{type(instances).__name__} has no methods draw and loss_of (see l2l_fast.problems.Replayable), which a "
            "CUDA graph needs; leave cuda_graph out"
        )
    if isinstance(instances, HeldOut):
        raise TypeError(
            f"{type(instances).__name__} has losses on held-out data, which no CUDA graph holds; leave cuda_graph out"
        )


def _check_rule(rule: nn.Module) -> None:
    if not isinstance(rule, CoordinatewiseLSTM):
        raise TypeError(
            f"a CUDA graph holds steps of a CoordinatewiseLSTM only, got {type(rule).__name__}; leave cuda_graph out"
        )
    device = rule.output.weight.device
    if device.type != _DEVICE_TYPE:
        raise ValueError(
            f"a CUDA graph needs the rule on a CUDA device, it is on {device}; move it there with .to('cuda') or "
            "--device cuda, or leave cuda_graph out"
        )


def check_graph(rule: nn.Module, problem: Problem) -> None:
    """Make sure that a graph can hold steps of ``rule`` on instances of ``problem``, whichever they are.

    Raises:
        TypeError, ValueError: if it can't; see :func:`check_capturable`.
    """
    _check_rule(rule)  # before data are loaded
    generator, device = torch.Generator().manual_seed(0), next(rule.parameters()).device
    captured, other = (problem.sample(1, generator=generator, device=device) for _ in range(2))
    check_capturable(rule, captured)
    assert isinstance(captured, Replayable)
    assert isinstance(other, Replayable)
    params = other.init(generator=generator)
    before = generator.get_state()
    expected = other.loss(params, generator=generator)
    found = captured.loss_of(params, other.draw(generator=generator.set_state(before)))
    if not torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"loss and loss_of of {type(captured).__name__} differ, {expected.tolist()} and {found.tolist()}: what "
            "sets instances of a problem apart, and all that is random, must be in what draw returns; or leave "
            "cuda_graph out"
        )

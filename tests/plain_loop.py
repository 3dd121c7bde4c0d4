"""What :class:`LearnedOptimizer` has to do, as a loop over :func:`l2l_fast.reference.step`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numerics import in_storage
from torch import Tensor, nn

from l2l_fast import CoordinatewiseLSTM, Identity, LogAndSign, reference


def make_rule(
    generator: torch.Generator, hidden_size: int = 20, preprocess: LogAndSign | Identity | None = None
) -> CoordinatewiseLSTM:
    """A rule of random weights, large enough for updates that show."""
    rule = CoordinatewiseLSTM(hidden_size, preprocess or LogAndSign())
    with torch.no_grad():
        for weight in rule.parameters():
            weight.copy_(torch.rand(weight.shape, generator=generator) - 0.5)
    return rule


def make_params(
    shapes: Sequence[tuple[int, ...]], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Random parameters, at most 1 in magnitude, so that absolute tolerances mean the same for all of them."""
    return [nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1).to(dtype)) for shape in shapes]


def make_grads(params: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random gradients, contiguous whatever the strides of the parameters."""
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The states of a :class:`LearnedOptimizer`, in the order of its parameters."""
    return [entry["lstm"] for _, entry in sorted(optimizer.state_dict()["state"].items())]


class PlainLoop:
    """One parameter group: copies of its parameters, and a state ``[N, 2, 2, H]`` for each."""

    def __init__(
        self, params: Sequence[Tensor], rule: CoordinatewiseLSTM, state_dtype: torch.dtype = torch.float32
    ) -> None:
        self.params = [p.detach().clone(memory_format=torch.contiguous_format) for p in params]
        self.state_dtype = state_dtype
        self.states = [in_storage(rule.init_state(p.numel()), state_dtype) for p in params]
        self.spec = rule.spec
        self.weights = rule.flat_weights().detach()

    def step(
        self, grads: Sequence[Tensor | None], lr: float = 1.0, weight_decay: float = 0.0, maximize: bool = False
    ) -> None:
        for k, grad in enumerate(grads):
            if grad is None:
                continue
            signed = -grad if maximize else grad
            update, state = reference.step(self.spec, self.weights, signed.reshape(-1), self.states[k])
            param = self.params[k].to(self.weights.dtype)
            moved = (1 - lr * weight_decay) * param + lr * update.view(param.shape)
            self.params[k] = moved.to(self.params[k].dtype)
            self.states[k] = in_storage(state, self.state_dtype)


TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.int8: 6e-2}


def assert_params_close(params: Sequence[Tensor], loop: PlainLoop, state_dtype: torch.dtype = torch.float32) -> None:
    """A few roundings of the coarser of parameter and state apart; parameters here are about 1 in magnitude."""
    for actual, expected in zip(params, loop.params, strict=True):
        tolerance = max(TOLERANCE[actual.dtype], TOLERANCE[state_dtype])
        torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance)


def assert_states_close(actual: Sequence[Tensor], loop: PlainLoop) -> None:
    for state, expected in zip(actual, loop.states, strict=True):
        assert state.dtype == expected.dtype
        torch.testing.assert_close(state.reshape(expected.shape), expected, rtol=0, atol=TOLERANCE[loop.state_dtype])

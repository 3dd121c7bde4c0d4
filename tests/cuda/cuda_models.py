"""Parameters on a device, their optimizer, and gradients that move or stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from plain_loop import make_grads, make_params
from torch import Tensor

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.optim import LearnedOptimizer


def ragged_shapes(count: int = 300) -> list[tuple[int, ...]]:
    """A scalar, tensors without elements, and lengths that are no whole tiles."""
    lengths = torch.randint(0, 700, (count - 4,), generator=torch.Generator().manual_seed(1)).tolist()
    return [(), (0,), (3, 0, 2), (5, 7, 3), *((length,) for length in lengths)]


class Model:
    """``groups`` lists the shapes of each parameter group; options go to the optimizer."""

    def __init__(
        self,
        rule: CoordinatewiseLSTM,
        device: torch.device,
        *groups: Sequence[tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        backend: str = "triton",
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.device = device
        self.groups = [
            [torch.nn.Parameter(param.detach().to(device)) for param in make_params(shapes, generator, dtype)]
            for shapes in groups
        ]
        self.params = [param for group in self.groups for param in group]
        named = [{"params": group} for group in self.groups]
        self.optimizer = LearnedOptimizer(named, rule, backend=backend, **options)

    def gradients(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [grad.to(self.device) for grad in make_grads(self.params, generator)]

    def move_gradients(self, seed: int) -> None:
        """New gradients at new addresses, as after ``zero_grad(set_to_none=True)`` and a backward."""
        for param, grad in zip(self.params, self.gradients(seed), strict=True):
            param.grad = grad

    def fill_gradients(self, seed: int) -> None:
        """New gradients where the old ones were."""
        for param, grad in zip(self.params, self.gradients(seed), strict=True):
            assert param.grad is not None
            param.grad.copy_(grad)

    def step(self) -> None:
        self.optimizer.step()

    def steps(self, count: int, first: int = 0) -> None:
        for seed in range(first, first + count):
            self.move_gradients(seed)
            self.step()

    def flat(self) -> Tensor:
        """All parameters ``[N]``, on the CPU."""
        return torch.cat([param.detach().reshape(-1) for param in self.params]).cpu()

    def flat_states(self) -> Tensor:
        """All states ``[N, 2, 2, H]``, on the CPU."""
        entries = self.optimizer.state_dict()["state"]
        return torch.cat([entries[key]["lstm"].view(-1, 2, 2, 20).cpu() for key in sorted(entries)])


def assert_same(one: Model, other: Model) -> None:
    """The same bits in parameters and states, NaN equal to NaN."""
    for actual, expected in ((one.flat(), other.flat()), (one.flat_states(), other.flat_states())):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)

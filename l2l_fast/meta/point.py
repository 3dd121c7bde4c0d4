"""A point that steps move, and the gradient of the instances' losses there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from l2l_fast.meta.layout import Layout


class Point:
    """The parameters ``theta [N]`` as leaves that share its memory: each look sees what was written there last."""

    def __init__(self, layout: Layout, theta: Tensor) -> None:
        self._layout = layout
        self.params = {name: view.detach().requires_grad_() for name, view in layout.views(theta).items()}
        self._ones = theta.new_ones(layout.batch)

    def evaluate(self, loss: Callable[[Mapping[str, Tensor]], Tensor], out: Tensor, of: str = "loss") -> Tensor:
        """The losses ``[batch]`` of the parameters, detached; their gradient is written to ``out [N]``.

        Grad mode must be on.

        Args:
            of: what the instances call ``loss``, for messages.

        Raises:
            ValueError: if ``loss`` does not return one loss per instance, or not one that depends on the parameters.
        """
        losses = loss(self.params)
        self._layout.check_losses(losses, of)
        grads = torch.autograd.grad(losses, tuple(self.params.values()), self._ones, materialize_grads=True)
        self._layout.gather(grads, out=out)
        return losses.detach()

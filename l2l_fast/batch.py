"""What one call of a backend updates, and what happens before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from l2l_fast import rounding, safety, sharding
from l2l_fast.options import Options
from l2l_fast.prepared import Runner

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Batch:
    """Parameters of one group, one device and one dtype; ``dtype`` is that in which the backend steps them.

    ``params`` are what this process holds, and ``sharded`` has the whole of those that are shards, by their index.
    """

    __slots__ = ("_copies", "dtype", "grads", "options", "params", "runner", "sharded", "states")

    def __init__(self, runner: Runner, options: Options, dtype: torch.dtype) -> None:
        self.runner = runner
        self.options = options
        self.dtype = dtype
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: list[Tensor] = []
        self.sharded: dict[int, DTensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []

    def add_as_copies(self, param: Tensor, grad: Tensor) -> None:
        """Take what a backend can't read in place."""
        sharding.check_plain(param, grad)
        if grad.layout != torch.strided:
            raise TypeError(
                f"LearnedOptimizer needs dense gradients, got layout {grad.layout} for a parameter of shape "
                f"{tuple(param.shape)}; build the module without sparse=True or set p.grad = p.grad.to_dense()"
            )
        copy = param.contiguous()
        if not param.is_contiguous():
            self._copies.append((param, copy))
        self.params.append(copy)
        self.grads.append(grad.resolve_neg().to(self.dtype).contiguous())

    def rests(self) -> bool:
        """Whether all gradients are 0, on all ranks that hold shards of them; waits for those and for the device."""
        moving = torch.stack([grad.any() for grad in self.grads]).float()
        return not bool(sharding.sum_over_shards(moving, self.sharded).any())

    def step_(self) -> None:
        """Step parameters and states."""
        self._call(self.params, self.grads)

    def _call(self, params: list[Tensor], grads: list[Tensor]) -> None:
        backend, prepared, layout = self.runner
        backend.step_(layout.spec, prepared, params, grads, self.states, **self.options.backend)

    def finish(self) -> None:
        """Bring to the parameters what was stepped elsewhere."""
        for param, copy in self._copies:
            param.copy_(copy)


class Workspace:
    """Memory and generators that a :class:`StagedBatch` finds again at its next step, as a CUDA graph needs it."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._generator: torch.Generator | None = None

    def like(self, params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Tensors of the shapes of ``params``, the same ones as long as parameters come in the same order."""
        same = len(self._buffers) == len(params) and all(
            buffer.shape == param.shape and buffer.dtype is dtype
            for buffer, param in zip(self._buffers, params, strict=True)
        )
        if not same:
            self._buffers = [torch.empty(param.shape, dtype=dtype, device=param.device) for param in params]
        return self._buffers

    def generator(self, device: torch.device, *numbers: int) -> torch.Generator:
        """A generator on ``device`` that starts from ``numbers``."""
        if self._generator is None:
            self._generator = torch.Generator(device)
        rounding.seed_(self._generator, *numbers)
        return self._generator


class StagedBatch(Batch):
    """A batch whose parameters are stepped as copies, so that the step can still be shortened, or rounded at random.

    Args:
        number: of the parameter group; groups round with other random numbers.
        workspace: of this group, device and dtype of parameters.
    """

    __slots__ = ("_number", "_stepped", "_workspace", "distances")

    def __init__(self, runner: Runner, options: Options, dtype: torch.dtype, number: int, workspace: Workspace) -> None:
        super().__init__(runner, options, dtype)
        device = runner.layout.device
        if options.rounding and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "stochastic_rounding seeds its generator anew at every step, which a captured CUDA graph would not "
                "repeat; take the optimizer's step outside of the graph or switch stochastic_rounding off"
            )
        self._number = number
        self._workspace = workspace

    def step_(self) -> None:
        self._stepped = self._workspace.like(self.params, self.dtype)
        torch._foreach_copy_(self._stepped, self.params)
        self._call(self._stepped, self._widened(self.grads))

    def measure(self) -> None:
        """Find how far each tensor would move."""
        self.distances = safety.distances(self._widened(self.params), self._stepped, self.sharded)

    def _widened(self, tensors: list[Tensor]) -> list[Tensor]:
        """Parameters or gradients in the dtype of the step; as they are where that is the parameters' own."""
        if self.params[0].dtype is self.dtype:
            return tensors
        return [tensor.to(self.dtype) for tensor in tensors]

    def shorten(self, joint: Tensor | None) -> None:
        """Take each tensor, or given the ``joint`` distance all of them, back to within the limit of the group."""
        limit = self.options.limit
        assert limit is not None
        shares: Sequence[Tensor]
        if joint is None:
            shares = safety.share(self.distances, limit).unbind()
        else:
            shares = [safety.share(joint, limit).to(self.distances)] * len(self.params)
        before = self._widened(self.params)
        # Of two forms of a weighted mean, PyTorch takes for a share of 1 the one that is exact.
        torch._foreach_lerp_(before, self._stepped, shares)
        self._stepped = before  # which may be the parameters themselves

    def finish(self) -> None:
        if self.options.rounding is None or self.params[0].dtype not in rounding.ROUNDED:
            if self._stepped is not self.params:
                torch._foreach_copy_(self.params, self._stepped)
        else:
            self._round(*self.options.rounding, self._number)
        super().finish()

    def _round(self, *numbers: int) -> None:
        """Round whole tensors from one generator that starts from ``numbers``, and every shard from one of its own.

        So replicas of a shard round alike, whatever else their ranks hold.
        """
        device = self.params[0].device
        numbers = (*numbers, rounding.ROUNDED.index(self.params[0].dtype))
        generator = self._workspace.generator(device, *numbers)
        pairs = list(zip(self.params, self._stepped, strict=True))
        for index, (param, stepped) in enumerate(pairs):
            if index not in self.sharded:
                rounding.round_(param, stepped, generator)
        for index, whole in self.sharded.items():
            generator = self._workspace.generator(device, *numbers, index, *sharding.shard_of(whole))
            rounding.round_(*pairs[index], generator)


def step_all(batches: Sequence[Batch]) -> None:
    """Step ``batches``, all of them before any limit is looked at, for a limit may be for all together."""
    for batch in batches:
        batch.step_()
    limited = [batch for batch in batches if isinstance(batch, StagedBatch) and batch.options.limit is not None]
    for batch in limited:
        batch.measure()
    jointly = [batch.distances for batch in limited if batch.options.joint]
    joint = safety.joint(jointly) if jointly else None
    for batch in limited:
        batch.shorten(joint if batch.options.joint else None)
    for batch in batches:
        batch.finish()

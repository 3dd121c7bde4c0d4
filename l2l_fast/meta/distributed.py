"""Processes that train together, by ``torch.distributed``; one alone is the same with nobody to talk to."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Team:
    """The ranks of ``torch.distributed``, if it is initialised when this is made; else this process alone.

    Every method but :meth:`share` is called by all ranks, in the same order. A rank that fails in its part says so
    to the others, which fail as well: nobody waits for a rank that has given up.

    Args:
        device: where the tensors that are exchanged live, which decides over gloo or NCCL.

    Attributes:
        rank: number of this process.
        size: how many there are.
    """

    def __init__(self, device: torch.device) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if together else 0
        self.size: int = dist.get_world_size() if together else 1
        self._device = device

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The numbers below ``count`` that fall to this rank.

        Raises:
            ValueError: if they can't be shared evenly.
        """
        if count % self.size:
            raise ValueError(
                f"{self.size} processes can't share shards={count} evenly; set shards to a multiple of {self.size}, or "
                f"start a number of processes that divides {count}"
            )
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def gather(self, work: Callable[[], Tensor], rows: int, columns: int) -> Tensor:
        """``work() [rows, columns]`` of every rank, one below the other in float64; the same on all of them.

        Raises:
            RuntimeError: if ``work`` failed on another rank, or a rank is gone; what it raises here is passed on.
        """
        if self.size == 1:
            return work().double()
        mine = torch.zeros(rows, columns + 1, dtype=torch.float64, device=self._device)
        failure: Exception | None = None
        try:
            mine[:, :columns] = work()
        except Exception as error:
            failure, mine[:, columns] = error, 1
        everyone = mine.new_empty(self.size * rows, columns + 1)
        try:
            dist.all_gather(list(everyone.chunk(self.size)), mine)
        except RuntimeError as error:
            if failure is None:
                raise RuntimeError(f"rank {self.rank} has lost the other processes: {error}") from error
        if failure is not None:
            raise failure
        failed = [rank for rank in range(self.size) if everyone[rank * rows, columns]]
        if failed:
            raise RuntimeError(
                f"rank {self.rank} stops because rank {' and '.join(map(str, failed))} failed, which says why"
            )
        return everyone[:, :columns]

    def together(self, work: Callable[[], T]) -> T:
        """``work()``, which every rank does.

        Raises:
            RuntimeError: as :meth:`gather` does.
        """
        results: list[T] = []

        def row() -> Tensor:
            results.append(work())
            return _number(None)

        self.gather(row, 1, 1)
        return results[0]

    def from_leader(self, work: Callable[[], float | None]) -> float:
        """``work()`` of the first rank, the only one that does it; 0 for ``None``.

        Raises:
            RuntimeError: as :meth:`gather` does.
        """
        return self.gather(lambda: _number(work() if self.leads else None), 1, 1)[0, 0].item()

    def greatest(self, work: Callable[[], float]) -> float:
        """The greatest ``work()`` of all ranks.

        Raises:
            RuntimeError: as :meth:`gather` does.
        """
        return self.gather(lambda: _number(work()), 1, 1).max().item()

    def collect(self, value: T) -> list[T]:
        """``value`` of every rank, on the first one; nothing on the others. It travels pickled."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size if self.leads else []
        dist.gather_object(value, values or None)
        return values

    def check_same(self, description: dict[str, Any]) -> None:
        """Make sure that all ranks are after the same.

        Raises:
            ValueError: if they are not, on the first rank.
            RuntimeError: in that case, on the others.
        """
        descriptions = self.collect(description)
        self.from_leader(lambda: _check_same(descriptions))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Write the values of the first rank to the ``tensors`` of the others."""
        if self.size == 1:
            return
        for tensor in tensors:
            values = tensor.detach().contiguous()
            dist.broadcast(values, src=0)
            tensor.detach().copy_(values)


def _check_same(descriptions: list[dict[str, Any]]) -> None:
    first = descriptions[0]
    for rank, other in enumerate(descriptions):
        differing = [
            f"{name} is {other.get(name, 'absent')!r} on rank {rank} but {first.get(name, 'absent')!r} on rank 0"
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]
        if differing:
            raise ValueError(f"all processes must train the same, but {'; '.join(differing)}")


def _number(value: float | None) -> Tensor:
    return torch.full((1, 1), value or 0.0, dtype=torch.float64)


def launched() -> bool:
    """Whether ``torchrun``, or what sets the same variables, has started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def restarted() -> bool:
    """Whether ``torchrun`` has started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def job() -> str:
    """What tells a ``torchrun`` job from others, the same for a process started in place of one that failed."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Inside, ``torch.distributed`` connects the processes that ``torchrun`` has started; without it nothing happens.

    Args:
        device: where to train. ``"cuda"`` is a device of its own for each process of a machine, and NCCL; else gloo.

    Yields:
        The device of this process.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not launched() or dist.is_initialized():
        yield device
        return
    from l2l_fast.meta.rendezvous import init_process_group  # not every build of PyTorch has what it imports

    # gloo for what lives on the CPU, such as the running state that a checkpoint collects.
    init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()

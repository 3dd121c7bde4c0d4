"""Processes connected by gloo that wait for what to run, so that many tests share the seconds they take to start."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once for all processes: seconds each would take again.
PRELOADED = ["torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"]


def serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    """A rank that does what it is told, until it is told ``None``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send(function(*arguments))
        except (Exception, KeyboardInterrupt) as error:
            pipe.send(error)
    dist.destroy_process_group()


class Ranks:
    def __init__(self, pipes: list[Connection]) -> None:
        self.pipes = pipes

    def __call__(self, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """What ``function`` returns or raises on each rank."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results: dict[Connection, Any] = {}
        patience = 120.0
        while len(results) < len(self.pipes):
            ready = wait([pipe for pipe in self.pipes if pipe not in results], timeout=patience)
            assert ready, f"a rank is left waiting; the others answered {list(results.values())}"
            for pipe in self.pipes:
                if pipe in ready:
                    results[pipe] = pipe.recv()
                    if isinstance(results[pipe], BaseException):
                        patience = 20.0  # it may be what the others wait for
        return [results[pipe] for pipe in self.pipes]


@contextmanager
def start_ranks(size: int, folder: Path) -> Iterator[Ranks]:
    """``size`` processes, for many tests: each test finds them in step, whatever became of the last."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(rank, size, str(folder / "store"), theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    yield Ranks(pipes)
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(10)
        process.kill()

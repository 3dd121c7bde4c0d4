"""Trainings that are compared by their best validation, one after the other or in processes of their own."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from torch import nn

from l2l_fast.meta.config import TrainConfig
from l2l_fast.meta.imitation import Teacher
from l2l_fast.meta.trainer import MetaTrainer
from l2l_fast.problems import Problem

ATTEMPTS = 3  # to make a trial whose process is killed


def best_validation_loss(
    rule: nn.Module, problem: Problem, config: TrainConfig, teacher: Teacher | None = None
) -> float:
    """What training leads to; infinite if it breaks down."""
    trainer = MetaTrainer(rule, problem, config, teacher=teacher)
    trainer.warns = False  # a learning rate that leads nowhere is what a search is for
    try:
        return trainer.fit().best_validation_loss
    except FloatingPointError:
        return math.inf


def in_processes(
    make_rule: Callable[[], nn.Module],
    make_problem: Callable[[], Problem],
    configs: Mapping[int, TrainConfig],
    jobs: int,
    teacher: Teacher | None = None,
) -> Generator[tuple[int, float], None, None]:
    """The best validation losses by number, as they come; ``jobs`` trainings at a time, on one thread each.

    A training whose process is killed is made again. When this generator is closed, by an error or Ctrl-C, or when
    this process ends, all trainings under way end too.

    Args:
        make_rule: called here; what it returns travels pickled.
        make_problem: called in every process; travels pickled itself.
        teacher: travels pickled.

    Raises:
        ValueError: if rule, ``make_problem`` or teacher can't be pickled.
        RuntimeError: if the process of a training ends without a result, by itself or killed three times.
        Exception: whatever a training raises.
    """
    others = _pickled("the problem", make_problem), _pickled("the teacher", teacher)
    payloads = {number: (config, _pickled("the rule", make_rule()), *others) for number, config in configs.items()}
    waiting = deque((number, 1) for number in configs)
    running: dict[Connection, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, attempt = waiting.popleft()
                trial = _Running.start(number, attempt, payloads[number])
                running[trial.results] = trial
            for results in wait(list(running)):
                assert isinstance(results, Connection)
                trial = running.pop(results)
                outcome = trial.outcome()
                if outcome is not None:
                    yield trial.number, outcome
                else:
                    waiting.appendleft((trial.number, trial.attempt + 1))
    finally:
        for trial in running.values():
            trial.process.kill()
            trial.process.join()
            trial.results.close()


@dataclass
class _Running:
    """A trial under way in a process of its own."""

    number: int
    attempt: int
    process: SpawnProcess
    results: Connection

    @classmethod
    def start(cls, number: int, attempt: int, payload: tuple[Any, ...]) -> _Running:
        # Not forked: threads of PyTorch do not survive that.
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, *payload), name=f"trial {number}")
        # Ctrl-C reaches the process too, but it is this one that ends it. The mask is inherited.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sender.close()  # now only the process has it, and its end is the end of the pipe
        return cls(number, attempt, process, receiver)

    def outcome(self) -> float | None:
        """The result, or ``None`` if the process was killed and the trial is to be made again."""
        try:
            result = self.results.recv()
        except (EOFError, OSError):
            result = None
        self.results.close()
        self.process.join()
        if isinstance(result, _Failure):
            raise result.error from RuntimeError(f"in the process of trial {self.number}:\n{result.traceback}")
        if result is None:
            code = self.process.exitcode
            assert code is not None
            killed = f"was killed by signal {-code}, {ATTEMPTS} times" if code < 0 else f"ended with exit code {code}"
            if code >= 0 or self.attempt == ATTEMPTS:
                raise RuntimeError(f"the process of trial {self.number} {killed}, before it had a result")
            return None
        assert isinstance(result, float)
        return result


@dataclass
class _Failure:
    error: Exception
    traceback: str


def _work(results: Connection, config: TrainConfig, rule: bytes, make_problem: bytes, teacher: bytes) -> None:
    """Make one trial; all that runs in its process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        problem = pickle.loads(make_problem)()
        results.send(best_validation_loss(pickle.loads(rule), problem, config, pickle.loads(teacher)))
    except Exception as error:
        results.send(_Failure(_portable(error), traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _pickled(what: str, value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{what} can't be sent to another process: {error}; define its parts at the top level of a module, or "
            "search with jobs=1"
        ) from error


def _portable(error: Exception) -> Exception:
    """``error``, or one in its place if it does not survive pickling."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__name__}: {error}")

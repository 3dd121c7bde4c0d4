"""One of the independent runs that a meta-update averages over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn

from l2l_fast.meta.checkpoint import select
from l2l_fast.meta.config import TrainConfig
from l2l_fast.meta.graph import StepGraph
from l2l_fast.meta.imitation import Teacher, imitate
from l2l_fast.meta.mirror import mirrored
from l2l_fast.meta.unroll import Unroll, unroll
from l2l_fast.problems import Instances, Problem
from l2l_fast.rule import CoordinatewiseLSTM


@dataclass
class _Run:
    """Where the current run on a batch of instances stands."""

    instances: Instances
    generator_state: Tensor  # from which the instances can be drawn again
    done: float  # how much of the training was, when they were drawn
    params: Mapping[str, Tensor] | None = None
    state: Tensor | None = None


class Shard:
    """Runs of ``config.batch_size`` instances, one after the other, with random numbers of their own.

    Args:
        number: which one it is.
        problem: where instances come from.
        config: settings.
        device: where instances live.
        teacher: whose steps the rule is to take; ``None`` minimises the losses.
        graph: takes the steps on a CUDA device; shards may share it.
    """

    def __init__(
        self,
        number: int,
        problem: Problem,
        config: TrainConfig,
        device: torch.device,
        teacher: Teacher | None = None,
        graph: StepGraph | None = None,
    ) -> None:
        self.number = number
        self._problem = problem
        self._config = config
        self._device = device
        self._teacher = teacher
        self._generator = torch.Generator().manual_seed(_seed(config.seed, number))
        self._graph = graph
        self._run: _Run | None = None

    def unroll(self, rule: nn.Module, position: int, done: float) -> Unroll:
        """The next segment of the run, which is ``position`` steps old; begins one if there is none.

        Args:
            done: share of the training that is done, and of the runs that a rule with a teacher drives itself.
        """
        config = self._config
        if self._run is None:
            self._run = self._start_run(done)
        if self._teacher is not None:
            assert isinstance(rule, CoordinatewiseLSTM)
            return imitate(
                rule,
                self._run.instances,
                self._teacher,
                config.horizon,
                rule_drives=bool(torch.rand((), generator=self._generator) < done),
                coordinate_fraction=config.coordinate_fraction,
                generator=self._generator,
                backend=config.backend,
            )
        steps = min(config.truncation, config.horizon - position)
        segment = unroll(
            rule,
            self._run.instances,
            steps,
            params=self._run.params,
            state=self._run.state,
            generator=self._generator,
            loss_weights=config.weights_between(position, position + steps),
            objective=config.objective,
            second_derivatives=config.second_derivatives,
            slope_floor=config.slope_floor,
            coordinate_fraction=config.coordinate_fraction,
            backend=config.backend,
            graph=self._graph,
        )
        self._run.params, self._run.state = segment.params, segment.state
        return segment

    def end_run(self) -> None:
        self._run = None

    def to_tensors(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of all that is needed to carry on elsewhere."""
        tensors = {"generator.now": self._generator.get_state()}
        if self._run is not None:
            assert self._run.params is not None
            assert self._run.state is not None
            tensors["generator.run"] = self._run.generator_state
            tensors["run.done"] = torch.tensor(self._run.done, dtype=torch.float64)
            tensors["run.state"] = self._run.state
            # Numbered, because the order of the names is that of the coordinates.
            for index, (name, tensor) in enumerate(self._run.params.items()):
                tensors[f"run.params.{index}.{name}"] = tensor
        # Parameters are views of one tensor, all of which would travel with each of them.
        return {
            f"shard.{self.number}.{name}": tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }

    def restore(self, checkpoint: Mapping[str, Tensor]) -> None:
        """Carry on from what :meth:`to_tensors` gave; other tensors in ``checkpoint`` are not looked at."""
        tensors = select(checkpoint, f"shard.{self.number}.")
        self._run = None
        if "generator.run" in tensors:
            self._generator.set_state(tensors["generator.run"])
            # Absent in a checkpoint of before there were mirrors.
            self._run = self._start_run(float(tensors.get("run.done", 1.0)))
            params = select(tensors, "run.params.")
            self._run.params = {
                key.split(".", 1)[1]: params[key].to(self._device)
                for key in sorted(params, key=lambda key: int(key.split(".", 1)[0]))
            }
            self._run.state = tensors["run.state"].to(self._device)
        self._generator.set_state(tensors["generator.now"])

    def _start_run(self, done: float) -> _Run:
        config = self._config
        generator_state = self._generator.get_state()
        assert config.batch_size is not None
        instances = self._problem.sample(config.batch_size, generator=self._generator, device=self._device)
        if self._teacher is None and done < config.mirrored:
            seed, chance = int(torch.randint(2**62, (), generator=self._generator)), done / config.mirrored
            if torch.rand((), generator=self._generator, dtype=torch.float64) >= chance:
                return _Run(mirrored(instances, seed), generator_state, done)
        # A graph holds losses of one kind of instances.
        return _Run(mirrored(instances, None) if config.mirrored and self._graph else instances, generator_state, done)


def _seed(seed: int, number: int) -> int:
    """The seed of the training itself for its first shard, one derived from it for each further one."""
    if number == 0:
        return seed
    return int(numpy.random.SeedSequence([seed, number]).generate_state(1, numpy.uint64)[0] >> numpy.uint64(1))

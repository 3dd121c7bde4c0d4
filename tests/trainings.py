"""Small problems, rules and trainings, and how to tell whether two trainings were the same."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from l2l_fast.meta import TrainConfig, TrainEvent
from l2l_fast.rule import CoordinatewiseLSTM

SMALL = TrainConfig(
    updates=12,
    horizon=9,
    truncation=4,
    batch_size=2,
    mirrored=0.0,
    hold=0.0,
    clip=1.0,
    clip_ratio=None,
    average=None,
    validate_every=5,
    validation_functions=8,
    checkpoint_every=1,
)


class Square:
    """``f(x) = x^2`` from ``x_0 = 1``."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"x": torch.ones(self.batch, 1)}

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return params["x"].square().squeeze(1)


class SquareProblem:
    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Square:
        return Square(batch_size)


class LinearRule(nn.Module):
    """``update = weight * grad + bias``, zero to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def init_state(self, n: int) -> Tensor:
        return torch.zeros(n, 0)

    def forward(self, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight * grad + self.bias, state


class Digits:
    """Regressions with two parameters, named so that their order is not the alphabet's, on minibatches."""

    def __init__(self, slope: Tensor) -> None:
        self.slope = slope

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        batch = len(self.slope)
        return {
            "weight": torch.randn(batch, 3, generator=generator),
            "bias": torch.randn(batch, 1, generator=generator),
        }

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        x = torch.randn(len(self.slope), 5, 3, generator=generator)
        output = (x @ params["weight"].unsqueeze(-1)).squeeze(-1) + params["bias"]
        return (output - self.slope * x.sum(-1)).square().mean(1)


class DigitsProblem:
    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Digits:
        return Digits(torch.randn(batch_size, 1, generator=generator))


def make_rule(seed: int = 0) -> CoordinatewiseLSTM:
    torch.manual_seed(seed)
    return CoordinatewiseLSTM(preprocess=None)


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder's checkpoint and log but the seconds."""
    with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    progress = json.loads(metadata["progress"])
    for row in [progress, *progress["history"]]:
        del row["seconds"]
    with (folder / "log.csv").open(newline="") as log:
        rows = list(csv.DictReader(log))
    for row in rows:
        del row["seconds"]
    best = CoordinatewiseLSTM.load(folder / "best.safetensors")
    tensors |= {f"file.{name}": tensor for name, tensor in best.state_dict().items()}
    return {"tensors": tensors, "progress": progress, "log": rows, "card": best.card, "about": metadata["about"]}


def assert_same_training(first: Path, second: Path) -> None:
    left, right = contents(first), contents(second)
    assert left["tensors"].keys() == right["tensors"].keys()
    for name, tensor in left.pop("tensors").items():
        assert torch.equal(tensor, right["tensors"][name]), name
    del right["tensors"]
    assert left == right


class Stop(Exception):
    """Ends training from within, as a crash would."""


def stop_after(update: int) -> Callable[[TrainEvent], None]:
    def on_update(event: TrainEvent) -> None:
        if event.update == update:
            raise Stop

    return on_update

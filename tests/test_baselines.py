"""Tuning of the torch.optim baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from l2l_fast.baselines import BASELINES, GRID_DECADES, POINTS_PER_DECADE, Tuned, minimize, settle, tune
from l2l_fast.problems import Quadratic

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Parabola:
    """``f(theta) = curvature / 2 * theta^2`` from ``theta = 1``, for each of a list of curvatures."""

    curvatures: tuple[float, ...] = (1.0,)

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Parabolas:
        assert batch_size == len(self.curvatures)
        return Parabolas(torch.tensor(self.curvatures, device=device))


class Parabolas:
    def __init__(self, curvatures: Tensor) -> None:
        self.curvatures = curvatures

    def init(self, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"theta": torch.ones(len(self.curvatures))}

    def loss(self, params: Mapping[str, Tensor], *, generator: torch.Generator | None = None) -> Tensor:
        return self.curvatures / 2 * params["theta"] ** 2


def test_sgd_follows_its_formula(generator: torch.Generator) -> None:
    losses = minimize(Parabola((1.0, 0.5)).sample(2), "sgd", 0.25, 3, generator=generator)
    t = torch.arange(4)
    expected = torch.stack([0.5 * (1 - 0.25) ** (2 * t), 0.25 * (1 - 0.125) ** (2 * t)], dim=1)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("optimizer", BASELINES)
def test_instances_are_independent(optimizer: str, generator: torch.Generator) -> None:
    both = minimize(Parabola((1.0, 0.5)).sample(2), optimizer, 0.1, 5, generator=generator)
    for column, curvature in enumerate((1.0, 0.5)):
        alone = minimize(Parabola((curvature,)).sample(1), optimizer, 0.1, 5, generator=generator)
        torch.testing.assert_close(both[:, column], alone[:, 0], rtol=0, atol=0)


def test_runs_share_starts_and_leave_the_generator(generator: torch.Generator) -> None:
    before = generator.get_state()
    instances = Quadratic().sample(3, generator=torch.Generator().manual_seed(1))
    first = minimize(instances, "sgd", 1e-3, 2, generator=generator)
    second = minimize(instances, "adam", 1e-3, 2, generator=generator)
    assert torch.equal(first[0], second[0])
    assert torch.equal(generator.get_state(), before)


def test_a_run_that_diverges_ends_infinite(generator: torch.Generator) -> None:
    losses = minimize(Parabola().sample(1), "sgd", 1e10, 100, generator=generator)
    assert losses.shape == (101, 1)
    assert losses[0, 0] == 0.5
    assert losses[-1, 0] == math.inf


def test_unknown_baseline(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="unknown baseline 'lion'; known baselines: 'sgd', 'nag'"):
        minimize(Parabola().sample(1), "lion", 0.1, 1, generator=generator)


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    [
        # Measured with 2048 functions; a smaller sample may find a neighbour on the grid.
        ("sgd", 10 ** (-15 / 8)),
        ("nag", 1e-2),
        ("rmsprop", 10 ** (-10 / 8)),
        ("adam", 10 ** (1 / 8)),
    ],
)
def test_tuning_on_quadratics(optimizer: str, lr: float, generator: torch.Generator) -> None:
    tried: list[None] = []
    tuned = tune(Quadratic(), optimizer, functions=256, generator=generator, on_run=lambda: tried.append(None))
    assert abs(math.log10(tuned.lr / lr)) * POINTS_PER_DECADE < 2.5
    assert len(tried) == (GRID_DECADES[1] - GRID_DECADES[0]) * POINTS_PER_DECADE + 1


@pytest.mark.parametrize("curvature", [1e6, 1e-4])
def test_the_grid_grows_until_its_best_point_is_inside(curvature: float, generator: torch.Generator) -> None:
    """SGD is best at 1 / curvature here, beyond the grid that tuning starts with."""
    tuned = tune(Parabola((curvature,)), "sgd", steps=3, functions=1, generator=generator)
    assert tuned.lr == pytest.approx(1 / curvature)
    assert not 10.0 ** GRID_DECADES[0] < tuned.lr < 10.0 ** GRID_DECADES[1]


def test_a_best_point_at_the_edge_of_every_grid_is_an_error(generator: torch.Generator) -> None:
    with pytest.raises(RuntimeError, match=r"sgd can't be tuned: .* lies at the edge of the learning rates from 1e-10"):
        tune(Parabola((1e20,)), "sgd", steps=3, functions=1, generator=generator)


def test_settle_keeps_a_learning_rate_that_works(generator: torch.Generator) -> None:
    tuned = Tuned("sgd", point=-8, loss=0.3)
    settled, losses = settle(tuned, Parabola((1.0, 2.0)).sample(2), 20, generator=generator)
    assert settled == tuned
    assert torch.equal(losses, minimize(Parabola((1.0, 2.0)).sample(2), "sgd", 0.1, 20, generator=generator))


def test_settle_steps_down_for_a_single_function(generator: torch.Generator) -> None:
    """At lr 1 the second function grows by the factor 1.25 per step, at the next lower one it shrinks."""
    steep = Parabola((1.0, 2.25)).sample(2)
    settled, losses = settle(Tuned("sgd", point=0, loss=0.1), steep, 4, generator=generator)
    assert (settled.point, settled.stepped_down) == (-1, 1)
    assert settled.lr == pytest.approx(10 ** (-1 / 8))
    assert (losses[-1] < losses[0]).all()


def test_settle_gives_up_two_decades_down(generator: torch.Generator) -> None:
    with pytest.raises(RuntimeError, match="diverges on the evaluation functions, and so it does down to"):
        settle(Tuned("sgd", point=0, loss=0.1), Parabola((1e4,)).sample(1), 50, generator=generator)

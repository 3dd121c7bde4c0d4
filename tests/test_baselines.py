"""Tuning of the torch.optim baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from l2l_fast.baselines import (
    BASELINES,
    COARSE_STRIDE,
    COARSE_TO_FINE_POINTS,
    GRID_DECADES,
    GRID_POINTS,
    POINTS_PER_DECADE,
    Tuned,
    final_losses,
    minimize,
    settle,
    tune,
)
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
    run = minimize(Parabola((1.0, 0.5)).sample(2), "sgd", 0.25, 3, generator=generator)
    t = torch.arange(4)
    theta = torch.stack([(1 - 0.25) ** t, (1 - 0.125) ** t], dim=1)
    torch.testing.assert_close(run.losses, torch.tensor([0.5, 0.25]) * theta**2)
    torch.testing.assert_close(run.params, {"theta": theta[-1]})
    assert not run.params["theta"].requires_grad


@pytest.mark.parametrize("optimizer", BASELINES)
def test_instances_are_independent(optimizer: str, generator: torch.Generator) -> None:
    both = minimize(Parabola((1.0, 0.5)).sample(2), optimizer, 0.1, 5, generator=generator).losses
    for column, curvature in enumerate((1.0, 0.5)):
        alone = minimize(Parabola((curvature,)).sample(1), optimizer, 0.1, 5, generator=generator).losses
        torch.testing.assert_close(both[:, column], alone[:, 0], rtol=0, atol=0)


def test_runs_share_starts_and_leave_the_generator(generator: torch.Generator) -> None:
    before = generator.get_state()
    instances = Quadratic().sample(3, generator=torch.Generator().manual_seed(1))
    first = minimize(instances, "sgd", 1e-3, 2, generator=generator)
    second = minimize(instances, "adam", 1e-3, 2, generator=generator)
    assert torch.equal(first.losses[0], second.losses[0])
    assert torch.equal(generator.get_state(), before)


def test_a_run_that_diverges_ends_infinite(generator: torch.Generator) -> None:
    losses = minimize(Parabola().sample(1), "sgd", 1e10, 100, generator=generator).losses
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
    assert len(tried) == GRID_POINTS == (GRID_DECADES[1] - GRID_DECADES[0]) * POINTS_PER_DECADE + 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_tuning_in_two_passes_finds_the_same(optimizer: str, generator: torch.Generator) -> None:
    tried: list[None] = []
    tuned = tune(
        Quadratic(), optimizer, functions=64, screening=64, generator=generator, on_run=lambda: tried.append(None)
    )
    # The fine pass draws other functions than the coarse one: they are what the grid has to be tried on.
    generator.manual_seed(20160614)
    Quadratic().sample(64, generator=generator)
    assert tuned == tune(Quadratic(), optimizer, functions=64, generator=generator)
    assert COARSE_TO_FINE_POINTS <= len(tried) < GRID_POINTS


@pytest.mark.parametrize(("screened", "curvature"), [(4.0, 1.0), (1.0, 4.0), (1.0, 1e3)])
def test_the_second_pass_leaves_the_neighbourhood_of_the_first(
    screened: float, curvature: float, generator: torch.Generator
) -> None:
    """Where the functions of the first pass mislead, the second widens its grid."""

    @dataclass(frozen=True)
    class Misleading(Parabola):
        def sample(
            self,
            batch_size: int,
            *,
            generator: torch.Generator | None = None,
            device: torch.device | str | None = None,
        ) -> Parabolas:
            return Parabolas(torch.full((batch_size,), screened if batch_size == 1 else curvature))

    tuned = tune(Misleading(), "sgd", steps=3, functions=2, screening=1, generator=generator)
    assert abs(math.log10(tuned.lr * curvature)) < 0.5 / POINTS_PER_DECADE


@pytest.mark.parametrize("curvature", [1e6, 1e-4])
def test_the_first_of_two_passes_widens_its_grid_too(curvature: float, generator: torch.Generator) -> None:
    tuned = tune(Parabola((curvature,)), "sgd", steps=3, functions=1, screening=1, generator=generator)
    assert tuned.lr == pytest.approx(1 / curvature)
    assert tuned.point % COARSE_STRIDE == 0


def test_the_last_point_is_judged_on_fixed_data(generator: torch.Generator) -> None:
    class Evaluated(Parabolas):
        def evaluate(self, params: Mapping[str, Tensor]) -> Tensor:
            return (params["theta"] - 0.5) ** 2

    class Overfit(Parabola):
        def sample(
            self,
            batch_size: int,
            *,
            generator: torch.Generator | None = None,
            device: torch.device | str | None = None,
        ) -> Parabolas:
            return Evaluated(torch.ones(batch_size))

    instances = Evaluated(torch.ones(2))
    params = {"theta": torch.tensor([0.0, 0.5])}
    losses = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    assert final_losses(instances, losses, params).tolist() == [0.25, 0.0]
    assert final_losses(Parabolas(torch.ones(2)), losses, params).tolist() == [2.0, 2.0]
    losses[1, 1] = math.nan
    assert final_losses(instances, losses, params).tolist() == [0.25, math.inf]
    # From 1, one step of SGD leads to 1 - lr; evaluation wants 0.5, and the loss would want 0.
    tuned = tune(Parabola((1.0,)), "sgd", steps=1, functions=1, generator=generator)
    assert tuned.lr == 1
    tuned = tune(Overfit(), "sgd", steps=1, functions=1, generator=generator)
    assert tuned.lr == pytest.approx(10 ** (-2 / 8))


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
    settled, run = settle(tuned, Parabola((1.0, 2.0)).sample(2), 20, generator=generator)
    assert settled == tuned
    again = minimize(Parabola((1.0, 2.0)).sample(2), "sgd", 0.1, 20, generator=generator)
    assert torch.equal(run.losses, again.losses)


def test_settle_steps_down_for_a_single_function(generator: torch.Generator) -> None:
    """At lr 1 the second function grows by the factor 1.25 per step, at the next lower one it shrinks."""
    steep = Parabola((1.0, 2.25)).sample(2)
    settled, run = settle(Tuned("sgd", point=0, loss=0.1), steep, 4, generator=generator)
    assert (settled.point, settled.stepped_down) == (-1, 1)
    assert settled.lr == pytest.approx(10 ** (-1 / 8))
    assert (run.losses[-1] < run.losses[0]).all()
    again, _ = settle(settled, steep, 4, generator=generator)
    assert again == settled


def test_settle_takes_noise_for_noise(generator: torch.Generator) -> None:
    """At lr 1 this function grows by 1.01 ** 2 per step: 8 % in four steps, less than minibatches may make of it."""
    tuned = Tuned("sgd", point=0, loss=1.0)
    assert settle(tuned, Parabola((2.01,)).sample(1), 4, generator=generator)[0] == tuned
    assert settle(tuned, Parabola((2.01,)).sample(1), 5, generator=generator)[0].stepped_down == 1


def test_settle_gives_up_two_decades_down(generator: torch.Generator) -> None:
    with pytest.raises(RuntimeError, match="diverges on the evaluation functions, and so it does down to"):
        settle(Tuned("sgd", point=0, loss=0.1), Parabola((1e4,)).sample(1), 50, generator=generator)


def test_a_parameter_that_is_not_used_stays_where_it_is() -> None:
    class Unused(Quadratic):
        def sample(self, batch_size: int, **options: Any) -> Any:
            instances = super().sample(batch_size, **options)
            start = instances.init

            def init(*, generator: torch.Generator | None = None) -> dict[str, Tensor]:
                return {**start(generator=generator), "unused": torch.ones(batch_size, 3)}

            instances.init = init  # type: ignore[method-assign]
            return instances

    generator = torch.Generator().manual_seed(0)
    instances = Unused(dim=3).sample(2, generator=generator)
    descent = minimize(instances, "sgd", 0.01, 3, generator=generator)
    assert torch.equal(descent.params["unused"], torch.ones(2, 3))
    assert bool(descent.losses.isfinite().all())

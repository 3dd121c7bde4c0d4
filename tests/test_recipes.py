"""Recipes of the shipped rules: stages build on each other and carry on after an interruption; teachers are tuned."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FixedTrial

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.baselines import descend
from l2l_fast.experiments import recipes, teacher_search, teachers
from l2l_fast.experiments.recipes import RULE, Recipe, Stage, recipe_for, reproduce
from l2l_fast.experiments.teacher import PowerMomentum, Relay
from l2l_fast.meta import MetaTrainer, TrainConfig
from l2l_fast.optim import LearnedOptimizer
from l2l_fast.problems import PROBLEMS, Quadratic
from l2l_fast.rule import available_rules

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = PowerMomentum(0.01, 0.8, 3.0, 0.8, 0.6, decay=0.7, decay_time=50.0)
SETTINGS: dict[str, Any] = {
    "updates": 4,
    "batch_size": 2,
    "validate_every": 2,
    "validation_functions": 4,
    "checkpoint_every": 1,
}
WHOLE = TrainConfig(horizon=6, truncation=6, **SETTINGS)
TINY = Recipe(
    "tiny",
    "quadratic",
    (
        Stage("imitate", WHOLE, teacher=TEACHER),
        Stage("sprint", TrainConfig(horizon=3, truncation=3, **SETTINGS), start="imitate"),
        Stage("relay", WHOLE, start="imitate", teacher=TEACHER, leader=("sprint", 2)),
    ),
    "Good for nothing.",
    choose_scale=True,
)


def same_weights(first: CoordinatewiseLSTM, second: CoordinatewiseLSTM) -> bool:
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_a_recipe_makes_a_rule_with_its_history(tmp_path: Path) -> None:
    rule = reproduce(TINY, 3, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-imitate", "2-sprint", "3-relay", RULE]
    found = CoordinatewiseLSTM.load(tmp_path / RULE)
    assert same_weights(found, rule)
    card = found.card
    assert card["command"] == "l2l-fast reproduce tiny --seed 3"
    assert card["limits"] == "Good for nothing."
    assert [stage["stage"] for stage in card["stages"]] == ["imitate", "sprint", "relay"]
    assert [stage["config"]["seed"] for stage in card["stages"]] == [3, 1003, 2003]
    assert card["stages"][0]["teacher"] == repr(TEACHER)
    assert "steps=2" in card["stages"][2]["teacher"]
    losses = card["validation_loss_by_output_scale"]
    assert {"0.09091", "0.1", "0.11"} <= losses.keys()
    assert losses[f"{found.spec.output_scale:.4g}"] == min(losses.values())
    last = CoordinatewiseLSTM.load(tmp_path / "3-relay" / "best.safetensors")
    assert same_weights(found, last)
    # Done is done: nothing is trained again.
    assert same_weights(reproduce(TINY, 3, tmp_path), rule)
    with pytest.raises(ValueError, match=r"belongs to another training: config\.seed is 3"):
        reproduce(TINY, 4, tmp_path)
    assert not same_weights(reproduce(TINY, 4, tmp_path / "other"), rule)


def test_an_interrupted_recipe_carries_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reproduce(TINY, 3, tmp_path / "whole")
    fits = 0

    def interrupted(trainer: MetaTrainer, *, description: str, resume: bool) -> Any:
        nonlocal fits
        fits += 1

        def stop(event: Any) -> None:
            if description == "relay" and event.update == 3:
                raise KeyboardInterrupt

        return trainer.fit(resume=resume, on_update=stop)

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reproduce(TINY, 3, tmp_path / "cut")
    assert fits == 3
    assert not (tmp_path / "cut" / RULE).exists()
    assert same_weights(reproduce(TINY, 3, tmp_path / "cut"), expected)


def test_the_best_scale_has_worse_ones_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, power, tried in ((0.01, 0, 3), (0.3, 3, 6), (-0.3, -3, 6), (9.0, 15, 17)):

        def loss(rule: CoordinatewiseLSTM, *_: Any, wanted: float = wanted) -> float:
            return abs(math.log(rule.spec.output_scale / 0.1) - wanted)

        monkeypatch.setattr(recipes, "validation_loss", loss)
        rule, losses = recipes.choose_scale(CoordinatewiseLSTM(), Quadratic(), WHOLE)
        assert rule.spec.output_scale == pytest.approx(0.1 * 1.1**power)
        assert len(losses) == tried
        assert list(losses) == sorted(losses, key=float)


@pytest.mark.parametrize("name", available_rules())
def test_every_shipped_rule_has_a_recipe(name: str) -> None:
    recipe = recipe_for(name)
    assert recipe.name == name
    names = [stage.name for stage in recipe.stages]
    assert len(set(names)) == len(names)
    for number, stage in enumerate(recipe.stages):
        assert stage.start is None or stage.start in names[:number]
        assert stage.leader is None or stage.leader[0] in names[:number]


def test_no_recipe() -> None:
    with pytest.raises(ValueError, match="there is no recipe for 'cifar', only for 'quadratic', 'mnist', 'digits'"):
        recipe_for("cifar")


def test_in_a_relay_the_rule_comes_first() -> None:
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM()
    relay = Relay(rule, 3, TEACHER)
    instances = Quadratic().sample(4, generator=torch.Generator().manual_seed(0))

    def run(make: Any, steps: int) -> torch.Tensor:
        return descend(instances, make, steps, generator=torch.Generator().manual_seed(1)).params["theta"]

    led = run(relay, 3)
    assert torch.equal(led, run(lambda params: LearnedOptimizer(params, rule), 3))
    # Afterwards the other one goes on with means of all gradients so far.
    param, twin = torch.zeros(5), torch.zeros(5)
    optimizer, alone = relay([param]), TEACHER([twin])
    for step in range(5):
        param.grad = twin.grad = torch.full((5,), float(step + 1))
        param.zero_()
        twin.zero_()
        optimizer.step()
        alone.step()
        assert torch.equal(param, twin) == (step >= 3)


@pytest.mark.parametrize("name", ["quadratic", "digits"])
def test_a_teacher_is_tuned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {**teacher_search._FIRST_TRIAL, "lr": 0.2, "slow": 6.0}  # too much of both
    monkeypatch.setattr(teacher_search, "STEPS", 5)
    monkeypatch.setattr(teacher_search, "_FIRST_TRIAL", first)
    problem = PROBLEMS[name]()
    one = teacher_search.search_teacher([problem], tmp_path, trials=1, runs=2)
    assert one == teacher_search._suggest(FixedTrial(first))
    best = teacher_search.search_teacher([problem], tmp_path, trials=12, runs=2)
    assert PowerMomentum(**json.loads((tmp_path / teacher_search.TEACHER).read_text())) == best
    assert best == teacher_search.search_teacher([problem], tmp_path, trials=12, runs=2)
    assert best != one


def test_a_teacher_is_judged_by_every_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_search, "_score", lambda instances, *_: float(instances.y.shape[-1]))
    teacher_search.search_teacher([Quadratic(dim=10), Quadratic(dim=20)], tmp_path, trials=1)
    [study] = optuna.get_all_study_summaries(f"sqlite:///{tmp_path / teacher_search.TRIALS_FILE}")
    assert study.best_trial is not None
    assert study.best_trial.value == 15
    with pytest.raises(ValueError, match="got none"):
        teacher_search.search_teacher([], tmp_path)


def test_settings_that_diverge_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_search, "STEPS", 30)
    monkeypatch.setattr(
        teacher_search, "_suggest", lambda trial: replace(TEACHER, lr=trial.suggest_float("lr", 1e-3, 1e30, log=True))
    )
    monkeypatch.setattr(teacher_search, "_FIRST_TRIAL", {"lr": 1e30})
    best = teacher_search.search_teacher([Quadratic()], tmp_path, trials=20, runs=2)
    assert best.lr < 1e10


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_shipped_teachers_are_sound(name: str) -> None:
    teacher = teachers.shipped_teacher(name)
    assert all(math.isfinite(value) for value in asdict(teacher).values())
    assert 0 < teacher.factor(200) < teacher.factor(0)

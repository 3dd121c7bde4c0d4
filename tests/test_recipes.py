"""Recipes of the shipped rules make them, and carry on after an interruption; teachers are tuned."""

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

from l2l_fast import CoordinatewiseLSTM, LogAndSign
from l2l_fast.experiments import recipes, teacher_search, teachers
from l2l_fast.experiments.recipes import RULE, Recipe, recipe_for, reproduce
from l2l_fast.experiments.teacher import PowerMomentum
from l2l_fast.meta import MetaTrainer, TrainConfig
from l2l_fast.problems import PROBLEMS, Quadratic
from l2l_fast.rule import as_rule, available_rules, load_rule

pytestmark = pytest.mark.usefixtures("one_thread")

TEACHER = PowerMomentum(0.04, 0.8, 3.0, 0.8, 0.6, agreement=1.3, decay=0.7, decay_time=50.0)
CONFIG = TrainConfig(
    updates=4, horizon=6, truncation=6, batch_size=2, validate_every=2, validation_functions=4, checkpoint_every=1
)
TINY = Recipe("tiny", Quadratic(), LogAndSign(), CONFIG, "Good for nothing.")


def same_weights(first: CoordinatewiseLSTM, second: CoordinatewiseLSTM) -> bool:
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_a_recipe_makes_a_rule_that_tells_how(tmp_path: Path) -> None:
    rule = reproduce(TINY, 3, tmp_path)
    found = CoordinatewiseLSTM.load(tmp_path / RULE)
    assert same_weights(found, rule)
    card = found.card
    assert card["command"] == "l2l-fast reproduce tiny --seed 3"
    assert card["limits"] == "Good for nothing."
    assert card["config"]["seed"] == 3
    assert same_weights(found, CoordinatewiseLSTM.load(tmp_path / "best.safetensors"))
    # Done is done: nothing is trained again.
    assert same_weights(reproduce(TINY, 3, tmp_path), rule)
    with pytest.raises(ValueError, match=r"belongs to another training: config\.seed is 3"):
        reproduce(TINY, 4, tmp_path)
    assert not same_weights(reproduce(TINY, 4, tmp_path / "other"), rule)


def test_a_recipe_refines_what_it_has_trained(tmp_path: Path) -> None:
    second = replace(CONFIG, updates=3, lr=1e-4, second_derivatives=True, validate_by="run", average=0.5)
    rule = reproduce(replace(TINY, refinement=second), 3, tmp_path)
    first = CoordinatewiseLSTM.load(tmp_path / "best.safetensors")
    trainer = MetaTrainer(first, Quadratic(), replace(second, seed=3))
    expected = trainer.fit().best_rule
    assert isinstance(expected, CoordinatewiseLSTM)
    assert same_weights(rule, expected)
    assert not same_weights(rule, CoordinatewiseLSTM.load(tmp_path / "best.safetensors"))
    card = CoordinatewiseLSTM.load(tmp_path / RULE).card
    assert card["config"]["second_derivatives"] is True
    assert card["begun_from"]["config"]["seed"] == 3
    assert card["begun_from"]["config"]["second_derivatives"] is False
    assert same_weights(reproduce(replace(TINY, refinement=second), 3, tmp_path), rule)


@pytest.mark.parametrize("stage", ["tiny", "tiny, refined"])
def test_an_interrupted_recipe_carries_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    recipe = replace(TINY, refinement=replace(CONFIG, second_derivatives=True))
    expected = reproduce(recipe, 3, tmp_path / "whole")

    def interrupted(trainer: MetaTrainer, *, description: str, resume: bool) -> Any:
        assert not resume

        def stop(event: Any) -> None:
            if event.update == 3 and description == stage:
                raise KeyboardInterrupt

        return trainer.fit(on_update=stop)

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reproduce(recipe, 3, tmp_path / "cut")
    assert not (tmp_path / "cut" / RULE).exists()
    carried_on = reproduce(recipe, 3, tmp_path / "cut")
    assert same_weights(carried_on, expected)
    assert carried_on.card == expected.card


def test_a_second_training_alone_is_refused(tmp_path: Path) -> None:
    """It does not know what it began from."""
    recipe = replace(TINY, refinement=replace(CONFIG, second_derivatives=True))
    reproduce(recipe, 3, tmp_path)
    for path in tmp_path.glob("*.*"):
        path.unlink()
    with pytest.raises(ValueError, match="refined holds the second part of a training whose first part is gone"):
        reproduce(replace(recipe, config=replace(CONFIG, lr=0.1)), 3, tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("name", available_rules())
def test_every_shipped_rule_has_a_recipe(name: str) -> None:
    recipe = recipe_for(name)
    assert recipe.name == name
    assert load_rule(name).card["problem"] == repr(recipe.problem)
    assert as_rule(name).spec.preprocess == recipe.preprocess


def test_no_recipe() -> None:
    with pytest.raises(ValueError, match="there is no recipe for 'cifar', only for 'quadratic', 'mnist', 'digits'"):
        recipe_for("cifar")


@pytest.mark.parametrize("name", ["quadratic", "digits"])
def test_a_teacher_is_tuned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {**teacher_search._FIRST_TRIAL, "lr": 1.0, "agreement": 0.5}  # too long, and of noise
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


def test_trials_of_another_score_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have other settings, and look better than any."""
    monkeypatch.setattr(teacher_search, "STEPS", 5)
    with monkeypatch.context() as patch:
        patch.setattr(teacher_search, "_VERSION", 1)
        patch.setattr(teacher_search, "_score", lambda *_: -1e9)
        teacher_search.search_teacher([Quadratic()], tmp_path, trials=3, runs=2)
    found = teacher_search.search_teacher([Quadratic()], tmp_path, trials=1, runs=2)
    assert found == teacher_search._suggest(FixedTrial(teacher_search._FIRST_TRIAL))
    new, old = (
        summary.best_trial.value
        for summary in sorted(
            optuna.get_all_study_summaries(f"sqlite:///{tmp_path / teacher_search.TRIALS_FILE}"),
            key=lambda summary: summary.n_trials,
        )
        if summary.best_trial is not None
    )
    assert old == -1e9
    assert new != old


def test_no_teacher_is_made_of_settings_that_all_diverge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_search, "_score", lambda *_: math.inf)
    with pytest.raises(ValueError, match="no trial had losses that are finite and positive"):
        teacher_search.search_teacher([Quadratic()], tmp_path, trials=2, runs=2)
    assert not (tmp_path / teacher_search.TEACHER).exists()


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
    assert 0 < teacher.length(200) < teacher.length(0)

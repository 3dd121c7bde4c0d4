"""The measurement of state precision: its forms, its drift, the bound on float16, and its command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from l2l_fast import load_rule
from l2l_fast.cli.app import app
from l2l_fast.experiments import precision, state_losses, tables
from l2l_fast.experiments.precision import FLOAT16_BOUND, FORMS, NARROW_BOUND, Form

pytestmark = pytest.mark.usefixtures("one_thread")

FORM = {form.name: form for form in FORMS}


def make_state(generator: torch.Generator, tiles: int = 4) -> torch.Tensor:
    """As a run leaves it, in float64: ``|h| < 1``, c up to a few units, magnitudes over three decades."""
    state = torch.randn(16 * tiles, 2, 2, 20, generator=generator, dtype=torch.float64)
    state *= 10 ** (-3 * torch.rand(2, 2, 20, generator=generator, dtype=torch.float64))
    state[:, :, 0].tanh_()
    return state


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_rounding_is_of_the_form(form: Form, generator: torch.Generator) -> None:
    """Zero stays zero but for the dither, the error is that of so many bits, and the state given is left alone."""
    state = make_state(generator)
    kept = state.clone()
    rounded = form.round(state, generator)
    assert torch.equal(state, kept)
    assert rounded.shape == state.shape
    assert rounded.dtype == torch.float64
    error = float((rounded - state).norm() / state.norm())
    coarsest = {32: 2**-24, 16: 2**-8, 12: 2**-4, 8.8: 2**-6, 9: 2**-4, 8.5: 2**-4, 8: 2**-3}[form.bits]
    assert coarsest / 2**12 < error < coarsest
    zero = form.round(torch.zeros_like(state), generator)
    assert float(zero.abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int8", "e4m3", "e5m2"])
def test_rounding_twice_is_rounding_once(name: str, generator: torch.Generator) -> None:
    once = FORM[name].round(make_state(generator), generator)
    assert torch.equal(FORM[name].round(once, generator), once)


def test_scales_are_shared_by_sixteen_coordinates(generator: torch.Generator) -> None:
    """A large number costs its neighbours in the tile their digits, and those of other tiles and units nothing."""
    state = make_state(generator)
    form = FORM["int8/tile"]
    before = form.round(state, generator)
    state[3, 0, 1, 5] = 1000.0
    changed = (form.round(state, generator) != before).nonzero()
    assert changed[:, 0].max() < 16
    assert torch.unique(changed[:, 1:], dim=0).tolist() == [[0, 1, 5]]


@pytest.mark.parametrize("kind", ["random", "dither"])
def test_random_rounding_is_right_in_the_mean(kind: str, generator: torch.Generator) -> None:
    state = make_state(generator, tiles=1)
    form = FORM[f"int8/tile, {kind}"]
    draws = torch.stack([form.round(state, generator) for _ in range(400)])
    step = state.abs().amax(0) / 127
    assert float(((draws.mean(0) - state) / step).abs().max()) < 0.15  # six standard errors
    nearest = FORM["int8/tile"].round(state, generator)
    assert float(((nearest - state) / step).abs().max()) > 0.4


def test_a_form_that_rounds_nothing_does_not_drift(generator: torch.Generator) -> None:
    grads = torch.randn(20, 32, generator=generator)
    *_, last = precision.simulate(load_rule("quadratic"), (Form("exact", 64, lambda state, _: state),), grads)
    assert torch.equal(last[0], last[1])
    assert last[0].abs().min() > 0


@pytest.mark.parametrize("rule", ["fresh", "fresh, forget bias 3", "quadratic"])
def test_narrow_states_keep_their_bounds(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 300 steps, by the optimizer on every backend that works here, next to float32 and bfloat16."""
    monkeypatch.setattr(precision, "FORMS", FORMS[:4])
    chosen = {rule: precision.rules()[rule]}
    drifts = precision.measure(chosen, coordinates=32, steps=300)
    assert {drift.backend for drift in drifts} == {"exact", *precision.measurable_backends()}
    at = {(drift.backend, drift.form): drift.drift[300] for drift in drifts}
    for backend in ("exact", *precision.measurable_backends()):
        assert at[backend, "float32"] < 1e-5
        assert at[backend, "float32"] < at[backend, "float16"] < FLOAT16_BOUND
        assert at[backend, "float16"] < at[backend, "bfloat16"] < at[backend, "int8"] < NARROW_BOUND


def test_the_numbers_repeat_and_the_marks_are_those_within_the_run() -> None:
    chosen = {"quadratic": load_rule("quadratic")}
    first, second = (precision.measure(chosen, coordinates=16, steps=101) for _ in range(2))
    assert first == second
    assert list(first[0].drift) == list(first[0].spread) == [100, 101]
    assert all(math.isfinite(value) and value > 0 for drift in first for value in drift.drift.values())
    assert len(first) == len(FORMS) + len(precision.STORAGE) * len(precision.measurable_backends())
    text = tables.precision_table(first)
    assert text.row_count == len(first)


def test_tiles_have_to_be_whole() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        precision.measure(coordinates=17)


def test_losses_of_narrow_states() -> None:
    """All forms are told apart, none is far from float32, and a rule that runs does better than one that rests."""
    losses = {loss.form: loss for loss in state_losses.measure(runs={"quadratic": 64}, steps=30)}
    assert list(losses) == list(precision.STORAGE)
    exact = losses["float32"]
    assert exact.difference == exact.difference_error == 0
    for form, loss in losses.items():
        assert math.isclose(loss.loss, exact.loss + loss.difference, rel_tol=1e-4)
        assert (form == "float32") == (loss.difference_error == 0)
        assert abs(loss.difference) < 0.2 * exact.loss
    (start,) = {loss.loss for loss in state_losses.measure(runs={"quadratic": 64}, steps=1)}
    assert exact.loss < 0.2 * start


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "available_rules", lambda: ("quadratic",))
    monkeypatch.setattr(state_losses, "RUNS", {"quadratic": 8})
    path = tmp_path / "new" / "precision.json"
    result = CliRunner().invoke(app, ["precision", "--coordinates", "16", "--steps", "2", "--json", str(path)])
    assert result.exit_code == 0, result.output
    for expected in ("rule fresh", "rule quadratic", "e4m3", "bfloat16", "int8", "own problems", "wrote"):
        assert expected in result.output
    written = json.loads(path.read_text())
    assert {drift["rule"] for drift in written["drifts"]} == {"fresh", "fresh, forget bias 3", "quadratic"}
    assert {loss["form"] for loss in written["losses"]} == set(precision.STORAGE)
    assert written["steps"] == 2
    assert written["machine"]["torch"] == torch.__version__
    wrong = CliRunner().invoke(app, ["precision", "--coordinates", "17"])
    assert wrong.exit_code == 2

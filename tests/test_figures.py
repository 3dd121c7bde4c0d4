"""The figures of the paper, at small sizes: what is drawn, what is written, and the command that does both."""

from __future__ import annotations

import csv
import functools
import json
import math
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from typer.testing import CliRunner

from l2l_fast import CoordinatewiseLSTM, unroll
from l2l_fast.baselines import BASELINES, Tuned
from l2l_fast.cli.app import app
from l2l_fast.experiments import figure_networks as networks
from l2l_fast.experiments import figure_steps, figures
from l2l_fast.experiments.evaluate import Evaluation, Run
from l2l_fast.experiments.figure_networks import Comparison, Panel
from l2l_fast.experiments.tuning import tune_baselines
from l2l_fast.problems import ImageClassifier, Quadratic

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = ImageClassifier("digits", hidden=(4,))
TUNED = {name: Tuned(name, point, 200.0) for name, point in zip(BASELINES, (-16, -16, -20, -20), strict=True)}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def rule() -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM()


@pytest.fixture
def comparison(rule: CoordinatewiseLSTM, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """Of a rule with baselines whose learning rates are taken for granted, on few and short runs."""
    monkeypatch.setattr("l2l_fast.experiments.tuning.tune", lambda _, name, **__: TUNED[name])
    return Comparison({"lstm": rule}, runs=3, steps=4)


@pytest.fixture
def tiny_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A MNIST of a few random images."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 12), ("t10k", 5)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
        for name, values in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape)
            (folder / name).write_bytes(header + values.numpy().tobytes())
    monkeypatch.setenv("L2L_FAST_DATA", str(folder))


@pytest.fixture
def no_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("l2l_fast.datasets.mnist.download", offline)
    monkeypatch.setenv("L2L_FAST_DATA", str(tmp_path))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def made_up(steps: int = 4, **finals: float) -> Evaluation:
    """An evaluation in which every function ends at the same loss, from 1."""
    runs = {
        name: Run(torch.linspace(1, final, steps + 1).unsqueeze(1).expand(-1, 3), torch.tensor([final] * 3) + 0.25)
        for name, final in finals.items()
    }
    learned = {"lstm": runs.pop("lstm")}
    return Evaluation("made up", steps, 3, 0, learned, runs)


def lines(figure: Figure) -> list[dict[str, Tensor]]:
    """The curves of every panel by the first word of their label."""
    return [
        {str(line.get_label()).split()[0]: torch.from_numpy(np.asarray(line.get_ydata())) for line in axes.get_lines()}
        for axes in figure.axes
    ]


def test_curves_are_drawn_as_the_paper_draws_them() -> None:
    evaluation = made_up(lstm=0.25, sgd=0.75, adam=0.5)
    figure = networks.curves_figure([Panel(evaluation), Panel(evaluation, first=2)])
    whole, later = lines(figure)
    assert list(whole) == ["SGD", "Adam", "LSTM"]
    torch.testing.assert_close(whole["LSTM"], torch.linspace(1, 0.25, 5, dtype=torch.float64))
    torch.testing.assert_close(later["LSTM"], whole["LSTM"][2:])
    for axes, first in zip(figure.axes, (0, 2), strict=True):
        assert (axes.get_yscale(), axes.get_xlim()) == ("log", (first, 4))
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "mean loss")
        styles = {str(line.get_label()): line.get_linestyle() for line in axes.get_lines()}
        assert styles == {"SGD  (1)": "--", "Adam  (0.75)": "--", "LSTM  (0.5)": "-"}


def test_figure_4(comparison: Comparison, tmp_path: Path) -> None:
    panels = networks.network_panels(comparison, DIGITS)
    first, later = panels["network"].evaluation, panels["carried_on"].evaluation
    assert (first.steps, later.steps, panels["carried_on"].first) == (4, 8, 4)
    for name, run in first.runs.items():
        # The same runs; only the loss of the last point is on another minibatch there.
        assert torch.equal(later.runs[name].losses[:5], run.losses)
    tuned = networks.tuned_for_longer(comparison, DIGITS, later)
    assert tuned.learned is later.learned

    panels = networks.quadratic_panels(comparison) | panels
    picture, curves, numbers = networks.write_curves_figure(tmp_path, "4", panels, {"tuned": tuned})
    assert picture.read_bytes().startswith(PNG)
    rows = table(curves)
    assert [int(row["step"]) for row in rows if (row["panel"], row["optimizer"]) == ("quadratic", "nag")] == [*range(5)]
    last = next(row for row in rows if tuple(row.values())[:3] == ("carried_on", "lstm", "8"))
    assert float(last["mean"]) == float(later.runs["lstm"].mean[-1])
    assert float(last["standard_error"]) == float(later.runs["lstm"].standard_error[-1])
    written = json.loads(numbers.read_text())["panels"]
    assert list(written) == ["quadratic", "network", "carried_on", "tuned"]
    assert written["network"]["final_loss"]["adam"] == first.runs["adam"].final_loss
    assert written["network"]["baselines"]["adam"]["lr"] == TUNED["adam"].lr


def test_figure_5_changes_one_thing_at_a_time(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[ImageClassifier] = []

    def on(_: Comparison, problem: ImageClassifier, name: str) -> Evaluation:
        tried.append(problem)
        return made_up(lstm=0.25, sgd=0.5)

    monkeypatch.setattr(Comparison, "on", on)
    assert list(networks.transfer_panels(comparison, DIGITS)) == ["wider", "deeper", "relu"]
    assert tried == [
        replace(DIGITS, hidden=(8,)),
        replace(DIGITS, hidden=(4, 4)),
        replace(DIGITS, activation="relu"),
    ]


def test_figure_6(comparison: Comparison, tmp_path: Path) -> None:
    evaluations = networks.architecture_evaluations(comparison, DIGITS, widths=(2, 4))
    assert list(evaluations) == [(1, 2), (1, 4), (2, 2), (2, 4)]
    generator = torch.Generator().manual_seed(evaluations[2, 4].seed)
    instances = replace(DIGITS, hidden=(4, 4)).sample(3)
    start = instances.loss(instances.init(generator=generator), generator=generator)
    assert torch.equal(evaluations[2, 4].runs["nag"].losses[0], start)

    _, finals, numbers = networks.write_architectures_figure(tmp_path, evaluations, (1, 4))
    rows = {(row["layers"], row["width"], row["optimizer"]): row for row in table(finals)}
    assert len(rows) == 4 * 5
    row = rows["2", "4", "sgd"]
    assert float(row["final_loss"]) == evaluations[2, 4].runs["sgd"].final_loss
    assert float(row["standard_error"]) == evaluations[2, 4].runs["sgd"].final_standard_error
    assert float(row["lr"]) == TUNED["sgd"].lr
    assert rows["2", "4", "lstm"]["lr"] == ""
    written = json.loads(numbers.read_text())["architectures"]
    assert [(entry["layers"], entry["width"]) for entry in written] == list(evaluations)
    assert written[3]["ratio_to_best_baseline"]["lstm"]["value"] == evaluations[2, 4].ratio("lstm").value


def test_figure_6_marks_what_the_rule_was_trained_on() -> None:
    finals = {(1, 2): 0.5, (1, 4): 0.25, (2, 2): 0.75, (2, 4): 0.5}
    evaluations = {key: made_up(lstm=final, sgd=0.6) for key, final in finals.items()}
    one, two = networks.architectures_figure(evaluations, (1, 4)).axes
    assert (one.get_title(), two.get_title()) == ("1 hidden layer", "2 hidden layers")
    dotted = [[line for line in axes.get_lines() if line.get_linestyle() == ":"] for axes in (one, two)]
    assert [np.asarray(line.get_xdata()).tolist() for line in dotted[0]] == [[4, 4], [0, 1]]
    for marks in dotted:
        assert np.asarray(marks[-1].get_ydata()).tolist() == [0.5, 0.5]
    (learned,) = [line for line in two.get_lines() if line.get_linestyle() == "-"]
    assert np.asarray(learned.get_ydata()).tolist() == [1.0, 0.75]


def test_trace_is_the_run_of_an_unroll(rule: CoordinatewiseLSTM) -> None:
    instances = DIGITS.sample(1)
    traced = figure_steps.trace(rule, instances, 4, (1, 3), torch.Generator().manual_seed(1))
    assert list(traced.states) == [1, 3]
    run = unroll(rule, instances, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(traced.states[3], run.state)
    assert traced.grads.shape == (4, traced.layout.n)
    assert traced.states[3].shape[0] == traced.layout.n


def test_picked_coordinates_are_those_of_their_names(rule: CoordinatewiseLSTM) -> None:
    traced = figure_steps.trace(rule, DIGITS.sample(1), 3, (2,), torch.Generator().manual_seed(1))
    picked = figure_steps.pick_coordinates(traced)
    assert [name[:2] for name in picked] == ["w1", "w1", "w2", "w2"]
    rms = traced.layout.views(traced.grads.square().mean(dim=0).sqrt())
    for name, place in picked.items():
        matrix, _, index = name.rstrip("]").partition("[")
        value = rms[matrix][0][tuple(map(int, index.split(", ")))]
        torch.testing.assert_close(value, traced.grads[:, place].square().mean().sqrt())
        assert value > 0
    largest, median = list(picked.values())[:2]
    sizes = traced.grads.square().sum(dim=0)[: 64 * 4]
    assert largest == int(sizes.argmax())
    assert 0 < sizes[median] < sizes[largest]


def test_responses_follow_the_formulas(rule: CoordinatewiseLSTM) -> None:
    problem = ImageClassifier("digits", hidden=(3,))
    tuned = {name: TUNED[name] for name in figure_steps.COMPARED}
    found = figure_steps.responses(rule, tuned, problem, at=(0, 2))
    assert [response.step for response in found] == [0, 2] * 4
    for response in found:
        torch.testing.assert_close(response.updates["sgd"], -TUNED["sgd"].lr * response.gradients)
        assert float(response.gradients.max()) > abs(response.gradient)
    first = found[0]
    # The first update of Adam has the same size whatever the gradient, and that of the rule starts from no state.
    assert first.updates["adam"][0] == pytest.approx(TUNED["adam"].lr, rel=1e-3)
    assert first.updates["adam"][-1] == pytest.approx(-TUNED["adam"].lr, rel=1e-3)
    fresh, _ = rule(first.gradients, rule.init_state(len(first.gradients)))
    torch.testing.assert_close(first.updates["lstm"], fresh.detach())


def test_adam_remembers_the_run() -> None:
    past = torch.tensor([0.5, -0.25, 0.125])
    gradients = torch.tensor([-1.0, 0.0, 2.0])
    updates = figure_steps._baseline_update("adam", 0.1, past, gradients)
    for gradient, update in zip(gradients, updates, strict=True):
        m = v = torch.tensor(0.0)
        for step, g in enumerate((*past, gradient), start=1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            expected = -0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(update, expected)


def test_figure_of_steps(rule: CoordinatewiseLSTM, tmp_path: Path) -> None:
    tuned = {name: TUNED[name] for name in figure_steps.COMPARED}
    found = figure_steps.responses(rule, tuned, DIGITS, at=(0, 2, 3))
    figure = figure_steps.responses_figure(found)
    assert len(figure.axes) == 4 * 3
    assert [axes.get_title() for axes in figure.axes[:3]] == ["step 0", "step 2", "step 3"]
    picture, curves, numbers = figure_steps.write_steps_figure(tmp_path, found, tuned)
    assert picture.read_bytes().startswith(PNG)
    rows = table(curves)
    assert len(rows) == sum(len(response.gradients) for response in found)
    assert float(rows[-1]["lstm"]) == found[-1].updates["lstm"][-1]
    assert json.loads(numbers.read_text())["baselines"]["sgd"]["lr"] == TUNED["sgd"].lr


@pytest.mark.usefixtures("tiny_mnist")
def test_learning_rates_of_every_figure_are_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(self: Comparison, problem: Quadratic | ImageClassifier, name: str) -> Evaluation:
        tuned = tune_baselines(problem, steps=self.steps)
        assert list(tuned) == list(BASELINES)
        assert all(math.isfinite(entry.loss) for entry in tuned.values())
        return made_up(self.steps, lstm=0.5, **{name: entry.loss for name, entry in tuned.items()})

    def tuned_anew(*_: object, **__: object) -> None:
        raise AssertionError("it is not shipped")

    monkeypatch.setattr("l2l_fast.experiments.tuning.tune", tuned_anew)
    monkeypatch.setattr(Comparison, "on", on)
    network, comparison = ImageClassifier("mnist"), Comparison({})
    networks.quadratic_panels(comparison)
    networks.tuned_for_longer(comparison, network, made_up(200, lstm=0.5, sgd=0.5))
    networks.transfer_panels(comparison, network)
    assert (1, 20) in networks.architecture_evaluations(comparison, network)


def run(*args: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``l2l-fast figure``."""
    result = CliRunner().invoke(app, ["figure", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def small(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with short runs and little else."""
    monkeypatch.setattr("l2l_fast.cli.figure.Comparison", functools.partial(Comparison, steps=4))
    monkeypatch.setattr(figure_steps.responses, "__defaults__", ((0, 2),))
    monkeypatch.setattr(networks.architecture_evaluations, "__defaults__", ((1, 2), (5, 20)))


@pytest.mark.usefixtures("small", "tiny_mnist")
@pytest.mark.parametrize(
    ("number", "printed"),
    [
        (
            "4",
            ["Quadratics: loss at step 4", "MNIST: loss at step 4", "carried on: loss at step 8", "tuned for 8 steps"],
        ),
        ("5", ["40 hidden units", "2 hidden layers", "ReLU"]),
        ("6", ["by architecture"]),
        ("steps", []),
    ],
)
def test_the_command_draws(number: str, printed: list[str], rule: CoordinatewiseLSTM, tmp_path: Path) -> None:
    rule.save(tmp_path / "rule.safetensors")
    out = tmp_path / "out"
    code, output, _ = run(number, "--rule", tmp_path / "rule.safetensors", "--runs", "2", "--out", out)
    assert code == 0
    for text in printed:
        assert text in output
    for suffix in ("png", "csv", "json"):
        assert (out / f"figure-{number}.{suffix}").stat().st_size > 100
        assert f"figure-{number}.{suffix}" in output


@pytest.mark.usefixtures("small", "no_mnist")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "only the left panel was drawn: the data set 'mnist' lacks .*--data-dir"),
        (("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), "only the left panel was drawn: .*ubyte is damaged"),
    ],
    ids=["missing", "damaged"],
)
def test_without_images_the_left_panel_is_drawn(
    rule: CoordinatewiseLSTM, tmp_path: Path, files: tuple[str, ...], message: str
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"torn")
    rule.save(tmp_path / "rule.safetensors")
    code, output, errors = run("4", "--rule", tmp_path / "rule.safetensors", "--runs", "2", "--out", tmp_path)
    assert code == 2
    assert "Quadratics: loss at step 4" in output
    assert re.search(message, errors)
    assert list(json.loads((tmp_path / "figure-4.json").read_text())["panels"]) == ["quadratic"]
    assert (tmp_path / "figure-4.png").read_bytes().startswith(PNG)


@pytest.mark.usefixtures("small", "no_mnist")
@pytest.mark.parametrize("number", ["5", "6", "steps"])
def test_the_others_need_images(number: str, rule: CoordinatewiseLSTM, tmp_path: Path) -> None:
    rule.save(tmp_path / "rule.safetensors")
    code, output, errors = run(number, "--rule", tmp_path / "rule.safetensors", "--out", tmp_path / "out")
    assert (code, output) == (2, "")
    assert errors.startswith("error: the data set 'mnist' lacks")
    assert not list((tmp_path / "out").iterdir())


def test_unknown_figure() -> None:
    code, _, errors = run("7")
    assert code == 2
    assert "'7'" in errors


def test_colours_and_labels_are_those_of_every_optimizer() -> None:
    assert figures.COLOURS.keys() == figures.LABELS.keys() == {"lstm", "shipped", *BASELINES}
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)

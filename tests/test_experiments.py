"""Evaluation, figures, numerics, speed and the demonstration, at small sizes."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from l2l_fast import CoordinatewiseLSTM, Identity, LogAndSign, RuleSpec
from l2l_fast.backends import get
from l2l_fast.baselines import BASELINES, Tuned
from l2l_fast.experiments import demo, numerics, speed, tables
from l2l_fast.experiments.effort import effort_for
from l2l_fast.experiments.evaluate import Evaluation, Run, compare, evaluate, evaluate_rules
from l2l_fast.experiments.machine import machine, threads
from l2l_fast.experiments.output import prepare_folder, write_bytes, write_json
from l2l_fast.experiments.progress import console
from l2l_fast.experiments.tuning import tune_baselines
from l2l_fast.problems import ImageClassifier, Quadratic, module_problem

pytestmark = pytest.mark.usefixtures("one_thread")

TUNED = {
    "sgd": Tuned("sgd", -15, 1.0),
    "nag": Tuned("nag", -16, 0.4),
    "rmsprop": Tuned("rmsprop", -10, 0.8),
    "adam": Tuned("adam", 1, 0.3),
}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def rule() -> CoordinatewiseLSTM:
    """A rule that never moves: its output layer is zero."""
    rule = CoordinatewiseLSTM(preprocess=None)
    torch.nn.init.zeros_(rule.output.weight)
    torch.nn.init.zeros_(rule.output.bias)
    return rule


@pytest.fixture
def evaluation(rule: CoordinatewiseLSTM) -> Evaluation:
    return evaluate(Quadratic(), {"lstm": rule}, TUNED, name="quadratic", functions=64)


def test_evaluation_compares_on_the_same_functions(evaluation: Evaluation) -> None:
    assert list(evaluation.runs) == ["lstm", *BASELINES]
    for run in evaluation.runs.values():
        assert run.losses.shape == (101, 64)
        assert torch.equal(run.losses[0], evaluation.learned["lstm"].losses[0])
    still = evaluation.learned["lstm"]
    assert torch.equal(still.losses, still.losses[:1].expand(101, 64))
    assert evaluation.best_baseline == min(BASELINES, key=lambda name: evaluation.baselines[name].final_loss)
    assert evaluation.ratio("lstm").won == 0
    assert evaluation.ratio("lstm").value > 20


def test_a_teacher_can_be_among_the_rules(rule: CoordinatewiseLSTM, evaluation: Evaluation) -> None:
    tuned = evaluation.baselines["adam"].tuned
    assert tuned is not None
    adam = partial(torch.optim.Adam, lr=tuned.lr)
    found = evaluate(Quadratic(), {"lstm": rule, "teacher": adam}, {}, name="quadratic", functions=64)
    assert torch.equal(found.learned["teacher"].losses, evaluation.baselines["adam"].losses)


def test_evaluation_is_reproducible_and_depends_on_its_seed(rule: CoordinatewiseLSTM) -> None:
    one, same, other = (
        evaluate(Quadratic(), {"lstm": rule}, {}, name="quadratic", functions=4, steps=2, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(one.learned["lstm"].losses, same.learned["lstm"].losses)
    assert not torch.equal(one.learned["lstm"].losses, other.learned["lstm"].losses)


@pytest.mark.parametrize(("steps", "functions"), [(0, 4), (5, 1)])
def test_evaluation_refuses_too_little(rule: CoordinatewiseLSTM, steps: int, functions: int) -> None:
    with pytest.raises(ValueError, match="at least 1 step and 2 functions"):
        evaluate(Quadratic(), {"lstm": rule}, {}, name="quadratic", functions=functions, steps=steps)


def test_an_unusable_backend_is_found_out_before_the_tuning(
    rule: CoordinatewiseLSTM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tuned(*args: object, **kwargs: object) -> None:
        raise AssertionError("baselines were tuned")

    monkeypatch.setattr("l2l_fast.experiments.tuning.tune", tuned)
    monkeypatch.setenv("L2L_FAST_BACKEND", "zz")
    with pytest.raises(ValueError, match="unknown backend 'zz'"):
        evaluate_rules(Quadratic(), {"lstm": rule}, name="quadratic")
    monkeypatch.setenv("L2L_FAST_BACKEND", "cpu")
    monkeypatch.setattr(get("cpu"), "unavailable", lambda *_: "it was not built")
    with pytest.raises(RuntimeError, match="L2L_FAST_BACKEND='cpu' can't be used: it was not built"):
        evaluate_rules(Quadratic(), {"lstm": rule}, name="quadratic")


def test_statistics_of_a_run() -> None:
    run = Run(torch.tensor([[1.0, 3.0, 5.0, 7.0]]))
    assert run.final_loss == 4
    assert run.final_standard_error == pytest.approx(math.sqrt(20 / 3 / 4))


def test_ratio_resamples_both_runs_together() -> None:
    losses = torch.rand(200, generator=torch.Generator().manual_seed(0)).exp()
    exact = compare(losses / 2, losses)
    assert (exact.value, exact.low, exact.high, exact.won) == pytest.approx((0.5, 0.5, 0.5, 1.0))
    noisy = compare(losses.flip(0) / 2, losses)
    assert noisy.low < noisy.value < noisy.high
    assert noisy.value == pytest.approx(0.5)
    # The spread of a ratio of two independent means, to first order.
    spread = 0.5 * math.sqrt(2 / 200) * float(losses.std() / losses.mean())
    assert noisy.high - noisy.low == pytest.approx(2 * 1.96 * spread, rel=0.25)


def test_evaluation_as_json_holds_no_infinity(evaluation: Evaluation, tmp_path: Path) -> None:
    diverged = Run(torch.full((101, 64), math.inf))
    broken = Evaluation("quadratic", 100, 64, 0, {"lstm": diverged}, evaluation.baselines)
    write_json(tmp_path / "out.json", broken.to_dict())
    assert json.loads((tmp_path / "out.json").read_text())["final_loss"]["lstm"] is None


def test_tuning_is_cached(tmp_path: Path) -> None:
    cache = tmp_path / "baselines.json"
    first = tune_baselines(Quadratic(), steps=5, functions=8, cache=tmp_path)
    assert list(first) == list(BASELINES)
    before = cache.read_text()
    changed = before.replace(f'"loss": {first["adam"].loss!r}', '"loss": 123.0')
    assert changed != before
    cache.write_text(changed)
    assert tune_baselines(Quadratic(), steps=5, functions=8, cache=tmp_path)["adam"].loss == 123
    other = tune_baselines(Quadratic(variant="deepmind"), steps=5, functions=8, cache=tmp_path)
    assert other["adam"].loss != 123
    assert len(json.loads(cache.read_text())) == 2
    assert tune_baselines(Quadratic(), steps=5, functions=8, cache=tmp_path, retune=True) == first
    assert tune_baselines(Quadratic(), steps=5, functions=8, cache=tmp_path) == first


@pytest.mark.parametrize("content", ["", "[]", "{", '{"key": {"sgd": 1}}'])
def test_a_damaged_cache_is_replaced(tmp_path: Path, content: str) -> None:
    cache = tmp_path / "baselines.json"
    cache.write_text(content)
    tuned = tune_baselines(Quadratic(), steps=5, functions=8, cache=tmp_path)
    assert tuned == tune_baselines(Quadratic(), steps=5, functions=8, cache=tmp_path)
    assert len(json.loads(cache.read_text())) == 1


def test_effort_suits_the_functions() -> None:
    toy = effort_for(Quadratic())
    network = effort_for(ImageClassifier("digits"))
    large = effort_for(ImageClassifier("digits", hidden=(2000,)))
    assert toy.functions > network.functions > large.functions
    assert toy.tuning > network.tuning > large.tuning
    assert (toy.screening, network.screening) == (None, 4)
    assert effort_for(Quadratic(dim=1000)) == effort_for(ImageClassifier("digits", hidden=(3,))) == network


def test_networks_are_judged_on_fixed_data(rule: CoordinatewiseLSTM) -> None:
    tuned = {"nag": Tuned("nag", -2, 2.0)}
    problem = ImageClassifier("digits", hidden=(4,))
    evaluation = evaluate(problem, {"lstm": rule}, tuned, name="digits", functions=3, steps=6)
    still, moved = evaluation.runs["lstm"], evaluation.runs["nag"]
    generator = torch.Generator().manual_seed(evaluation.seed)
    instances = problem.sample(3)
    starts = instances.init(generator=generator)
    torch.testing.assert_close(still.measures["final"], instances.evaluate(starts))
    torch.testing.assert_close(still.measures["test"], instances.evaluate(starts, "test"))
    torch.testing.assert_close(moved.measures["minibatch"], moved.losses[2:].mean(dim=0))
    torch.testing.assert_close(moved.measures["mean"], moved.losses.mean(dim=0))
    assert moved.final_loss == pytest.approx(float(moved.measures["final"].mean()))
    assert moved.final_loss != pytest.approx(float(moved.losses[-1].mean()), rel=1e-4)

    values = evaluation.to_dict()
    assert values["final_loss"]["nag"] == moved.final_loss
    assert values["other_measures"].keys() == {"minibatch", "test", "mean"}
    for measure, summary in values["other_measures"].items():
        assert summary["mean"]["lstm"] == pytest.approx(float(still.measures[measure].mean()))
        assert summary["ratio_to_best_baseline"]["lstm"]["value"] == evaluation.ratio("lstm", measure).value
    with console.capture() as capture:
        console.print(tables.measures_table(evaluation))
    assert "test data" in capture.get()


def test_no_test_loss_without_test_data(rule: CoordinatewiseLSTM) -> None:
    inputs = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))

    def losses(**data: tuple[torch.Tensor, torch.Tensor]) -> set[str]:
        problem = module_problem(
            lambda: torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, (inputs, inputs[:, :1]), minibatch=4, **data
        )
        return set(evaluate(problem, {"lstm": rule}, {}, name="linear", functions=2, steps=2).measures)

    assert losses() == {"final", "minibatch", "mean"}
    assert losses(test_data=(inputs, inputs[:, :1])) == {"final", "minibatch", "test", "mean"}


def test_the_reference_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards agree to the bit, and the backward written by hand is as good as autograd."""
    monkeypatch.setattr(numerics, "_CHUNK", 40)  # so that chunks and recomputed steps are used
    comparison = numerics.compare("reference", LogAndSign(), coordinates=100, steps=4)
    gradients = [f"d_{name}" for name in RuleSpec().weight_shapes]
    assert [row.quantity for row in comparison.rows] == [
        *("update", "state", *gradients, "d_grad", "d_state"),
        *("last update", "last state", *gradients, "d_state"),
    ]
    for row in comparison.rows:
        assert 0 < row.eager < 1e-4 * row.scale
        if row.quantity in ("update", "state", "last update", "last state"):
            assert row.fused == row.eager
        assert row.ratio < 4
    worst = numerics.summary(comparison)
    assert [row.run for row in worst.rows] == ["step"] * 5 + ["unroll"] * 4


@pytest.mark.parametrize("preprocess", [LogAndSign(), Identity()])
def test_a_wrong_backend_shows(preprocess: LogAndSign | Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a thousandth in one block of the weight gradient is seen in that block and in no other."""
    backend = get("reference")
    exact = backend.unroll_backward

    def wrong(*args: object) -> object:
        d_weights, d_state = exact(*args)  # type: ignore[arg-type]
        d_weights[-1] *= 1.001  # bias_out
        return d_weights, d_state

    monkeypatch.setattr(backend, "unroll_backward", wrong)
    comparison = numerics.compare("reference", preprocess, coordinates=64, steps=3)
    assert [(row.run, row.quantity) for row in comparison.rows if row.ratio > 50] == [("unroll", "d_bias_out")]


def test_numerics_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get("reference"), "unavailable", lambda *_: "it is closed on Sundays")
    with pytest.raises(RuntimeError, match="'reference' can't be compared: it is closed on Sundays"):
        numerics.compare("reference", Identity(), coordinates=4, steps=1)


def test_every_working_backend_is_compared_and_timed() -> None:
    working = [name for name, reason in numerics.fused_backends().items() if reason is None]
    assert "reference" not in numerics.fused_backends()
    comparisons = numerics.compare_all([Identity()], 32, 2)
    assert [comparison.backend for comparison in comparisons] == working
    for timing in (
        speed.time_forward(RuleSpec(), coordinates=32, rounds=2),
        speed.time_meta_step(RuleSpec(), coordinates=32, steps=2, rounds=2),
    ):
        assert list(timing.nanoseconds) == [*working, "eager"]
        assert all(0 < value < math.inf for value in timing.nanoseconds.values())
        assert timing.threads == 1


def test_threads_are_given_back() -> None:
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def test_machine_is_json() -> None:
    facts = json.loads(json.dumps(machine()))
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == 1


def test_prepare_folder_makes_folders_and_leaves_them_empty(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_prepare_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"can't write to the output folder .*file/out: .*; name another one"):
        prepare_folder(tmp_path / "file" / "out")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_bytes(target, b"old")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("l2l_fast.experiments.output.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_demo(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", "of an earlier demonstration")
    with console.capture() as capture:
        results = demo.demo(
            tmp_path, demo.Size(20, 32, tuning_functions=64, timed_coordinates=64, compared_coordinates=64)
        )
    printed = capture.get()
    for expected in ("20 updates", "Adam", "ns per coordinate", "largest error against float64", "results.json"):
        assert expected in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    rule = CoordinatewiseLSTM.load(tmp_path / "rule.safetensors")
    assert rule.spec.preprocess == Identity()

    values = json.loads(results.read_text())
    assert results == tmp_path / "results.json"
    assert (values["problem"], values["steps"], values["functions"]) == ("quadratic", 100, 32)
    keys = {"lstm", "shipped", "sgd", "nag", "rmsprop", "adam"}
    for kind in ("final_loss", "standard_error"):
        assert values[kind].keys() == keys
        assert all(value is None or value > 0 for value in values[kind].values())
        assert all(values[kind][name] is not None for name in keys - {"shipped"})
    assert values["machine"]["torch"] == torch.__version__
    assert values["training"]["updates"] == 20


def test_demo_looks_at_its_folder_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with console.capture() as capture, pytest.raises(OSError, match="can't write to the output folder"):
        demo.demo(tmp_path / "file" / "out")
    assert capture.get() == ""


def test_tables_mark_the_best_baseline_and_what_was_stepped_down(evaluation: Evaluation) -> None:
    steep = Tuned("sgd", 0, 1.0)  # far too high a learning rate
    result = evaluate(Quadratic(), {}, {**TUNED, "sgd": steep}, name="quadratic", functions=64)
    with console.capture() as capture:
        console.print(tables.evaluation_table(evaluation))
        console.print(tables.evaluation_table(result))
    first, second = capture.get().split("quadratic: loss")[1:]
    assert "LSTM" in first
    assert "*" not in first
    assert "* the tuned learning rate diverges here" in second

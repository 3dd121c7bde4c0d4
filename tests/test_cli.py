"""The command line: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import optuna
import pytest
import torch
from typer.testing import CliRunner

from l2l_fast import CoordinatewiseLSTM, LogAndSign, __version__, load_rule
from l2l_fast.backends import get
from l2l_fast.cli import main
from l2l_fast.cli.app import app
from l2l_fast.experiments import recipes
from l2l_fast.experiments.recipes import Recipe
from l2l_fast.meta import TrainConfig
from l2l_fast.problems import PROBLEMS, Quadratic

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--updates", "4", "--batch-size", "2", "--horizon", "4", "--truncation", "2"]


def run(*args: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error; nothing but an exit may leave the command."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def error_of(*args: str | Path) -> str:
    """The one line that a command which fails as expected prints."""
    code, _, err = run(*args)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def rule_file(tmp_path: Path) -> Path:
    path = tmp_path / "rule.safetensors"
    CoordinatewiseLSTM(preprocess=None).save(path)
    return path


def test_info() -> None:
    code, out, _ = run("info")
    assert code == 0
    for expected in (__version__, torch.__version__, "backend cpu", "backend reference", "works", "threads"):
        assert expected in out


def test_every_command_has_help() -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in (
        "info",
        "train",
        "evaluate",
        "figure",
        "reproduce",
        "tune-teacher",
        "numerics",
        "bench",
        "kernels",
        "demo",
    ):
        assert command in out
        assert run(command, "--help")[0] == 0


def test_train_writes_a_rule_and_refuses_to_overwrite_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run("train", "quadratic", *SMALL, "--out", out)
    assert code == 0
    assert "4 updates" in printed
    rule = (out / "best.safetensors").read_bytes()
    assert CoordinatewiseLSTM.load(out / "best.safetensors").spec.log_p == 0

    message = error_of("train", "quadratic", *SMALL, "--out", out)
    assert "holds checkpoint.safetensors, best.safetensors" in message
    assert "--resume" in message
    assert (out / "best.safetensors").read_bytes() == rule
    assert run("train", "quadratic", *SMALL, "--out", out, "--resume")[0] == 0


def test_train_passes_its_options_on(tmp_path: Path) -> None:
    options = {
        "--updates": "3", "--lr": "0.02", "--batch-size": "2", "--truncation": "3", "--horizon": "6",
        "--preprocess": "log", "--p": "7", "--output-scale": "0.2", "--hidden-size": "4", "--seed": "5",
        "--max-seconds": "60",
    }  # fmt: skip
    flat = [text for option in options.items() for text in option]
    code, printed, _ = run("train", "quadratic", *flat, "--second-derivatives", "--diagnose", "--out", tmp_path / "out")
    assert code == 0
    assert "saturated gates" in printed
    rule = CoordinatewiseLSTM.load(tmp_path / "out" / "best.safetensors")
    assert rule.spec.preprocess == LogAndSign(7)
    assert (rule.spec.output_scale, rule.spec.hidden_size) == (0.2, 4)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    expected = {
        "updates": 3, "lr": 0.02, "batch_size": 2, "truncation": 3, "horizon": 6, "seed": 5, "max_seconds": 60.0,
        "second_derivatives": True,
    }  # fmt: skip
    assert {name: summary["config"][name] for name in expected} == expected


def test_training_depends_on_its_seed_only(tmp_path: Path) -> None:
    rules = []
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run("train", "quadratic", *SMALL, "--seed", seed, "--out", tmp_path / folder)[0] == 0
        rules.append(CoordinatewiseLSTM.load(tmp_path / folder / "best.safetensors").flat_weights())
    assert torch.equal(rules[0], rules[1])
    assert not torch.equal(rules[0], rules[2])


def test_train_searches_a_learning_rate(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run("train", "quadratic", *SMALL, "--search", "2", "--out", out)
    assert code == 0
    assert "learning rates tried" in printed
    config = json.loads((out / "summary.json").read_text())["config"]
    assert config["lr"] != 0.01
    assert "search.db" in error_of("train", "quadratic", *SMALL, "--search", "2", "--out", out)
    assert run("train", "quadratic", *SMALL, "--search", "2", "--out", out, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "nan"], "lr must be finite and positive, got nan"),
        (["--lr", "-1"], "lr must be finite and positive, got -1.0"),
        (["--truncation", "200"], "truncation must be at most the horizon"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--hidden-size", "0"], "hidden_size must be at least 1"),
        (["--preprocess", "log", "--p", "inf"], "LogAndSign.p must be a finite number"),
        (["--max-seconds", "0"], "max_seconds must be finite and positive"),
    ],
)
def test_train_refuses_settings_before_it_makes_a_folder(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in error_of("train", "quadratic", *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named_by", ["variable", "option"])
def test_an_unusable_backend_is_refused_before_there_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_by: str
) -> None:
    options = ["--backend", "cpu"] if named_by == "option" else []
    if named_by == "variable":
        monkeypatch.setenv("L2L_FAST_BACKEND", "cpu")
    monkeypatch.setattr(get("cpu"), "unavailable", lambda *_: "it was not built")
    assert "it was not built" in error_of("train", "quadratic", *SMALL, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_train_says_when_the_rule_is_untrained(tmp_path: Path) -> None:
    command = ["train", "quadratic", "--updates", "500", "--horizon", "4", "--truncation", "2", "--out", str(tmp_path)]
    code, printed, err = run(*command, "--max-seconds", "1e-6")
    assert code == 0
    assert "after 0 updates" in printed
    assert "best.safetensors holds the untrained rule: training stopped before its first validation" in err
    hopeless = ["train", "quadratic", *SMALL, "--lr", "1e30", "--out", str(tmp_path / "hopeless")]
    assert "holds the untrained rule: no validation was better" in run(*hopeless)[2]


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ([], "interrupted; nothing was kept"),
        (["search.db"], "holds the trials of the search: the same command with --resume carries on with them"),
        (["search.db", "checkpoint.safetensors"], "holds a checkpoint: the same command with --resume"),
    ],
)
def test_ctrl_c_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: list[str], message: str
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        for name in left:
            (tmp_path / name).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("l2l_fast.experiments.training.search", interrupted)
    code, _, err = run("train", "quadratic", *SMALL, "--search", "2", "--out", tmp_path)
    assert code == 130
    assert message in err


@pytest.mark.parametrize(
    ("command", "what"), [("reproduce", "recipes.reproduce"), ("tune-teacher", "teacher_search.search_teacher")]
)
def test_ctrl_c_where_the_same_command_carries_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, what: str
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"l2l_fast.experiments.{what}", interrupted)
    ended = run(command, "quadratic", "--out", tmp_path)
    assert ended == (130, "", "\ninterrupted; the same command carries on\n")


def test_ctrl_c_anywhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("l2l_fast.cli.app.machine", interrupted)
        assert run("info") == (130, "", "\ninterrupted\n")
    monkeypatch.setattr("l2l_fast.cli.app.app", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["info"])
    assert end.value.code == 130


def test_resume_without_a_checkpoint(tmp_path: Path) -> None:
    assert "there is no file" in error_of("train", "quadratic", *SMALL, "--out", tmp_path, "--resume")


def test_resume_with_other_settings(tmp_path: Path) -> None:
    assert run("train", "quadratic", *SMALL, "--out", tmp_path)[0] == 0
    message = error_of("train", "quadratic", *SMALL, "--lr", "0.5", "--out", tmp_path, "--resume")
    assert "config.lr is 0.01 in the checkpoint but 0.5 here" in message


@pytest.mark.parametrize("command", [["train", "cubic"], ["evaluate", "cubic", "--rule", "quadratic"]])
def test_unknown_problem(command: list[str]) -> None:
    message = error_of(*command)
    assert "unknown problem 'cubic'" in message
    for name in PROBLEMS:
        assert repr(name) in message


def test_evaluate(rule_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run(
        "evaluate", "quadratic", "--rule", rule_file, "--functions", "8", "--steps", "5", "--out", out
    )
    assert code == 0
    for expected in ("LSTM", "SGD", "NAG", "RMSprop", "Adam", "step 5", "8 fresh functions"):
        assert expected in printed
    values = json.loads((out / "evaluation.json").read_text())
    assert values["final_loss"].keys() == {"lstm", "sgd", "nag", "rmsprop", "adam"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "baselines.json").exists()


def test_evaluate_a_network(rule_file: Path, tmp_path: Path) -> None:
    settings = ["--set", "hidden=3", "--set", "activation=relu"]
    options: list[str | Path] = ["--rule", rule_file, "--runs", "2", "--steps", "2", "--out", tmp_path / "out"]
    code, printed, _ = run("evaluate", "digits", *settings, *options)
    assert code == 0
    assert "digits hidden=3 activation=relu: loss at step 2" in printed
    for expected in ("on fixed data", "minibatch", "test data"):
        assert expected in printed
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert values["other_measures"].keys() == {"minibatch", "test", "mean"}


def test_evaluate_several_rules_and_the_teacher(rule_file: Path, tmp_path: Path) -> None:
    known = ["--rule", "digits", "--teacher", "shipped", "--steps", "100", "--runs", "2"]
    assert run("evaluate", "digits", "--rule", rule_file, *known, "--out", tmp_path / "out")[0] == 0
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(values["final_loss"])[:3] == [str(rule_file), "digits", "teacher"]
    assert values["final_loss"]["teacher"] < values["final_loss"]["nag"]
    message = error_of("evaluate", "quadratic", "--rule", "quadratic", "--teacher", "shipped")
    assert "no teacher was tuned for 'quadratic', only for 'mnist', 'digits'" in message


def test_evaluate_a_problem_of_the_user(rule_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from l2l_fast.problems import Quadratic\ndef make(dim=3):\n    return Quadratic(dim=dim)\n"
    )
    options: list[str | Path] = ["--rule", rule_file, "--runs", "4", "--steps", "2", "--out", tmp_path / "out"]
    code, printed, _ = run("evaluate", f"{tmp_path / 'mine.py'}:make", *options, "--set", "dim=2")
    assert code == 0
    assert "mean over 4 fresh functions" in printed
    tuned = (tmp_path / "out" / "baselines.json").read_text()
    assert "Quadratic(dim=2" in tuned
    (tmp_path / "out" / "baselines.json").write_text(tuned.replace('"point": ', '"point": -9'))
    assert run("evaluate", "--problem", f"{tmp_path / 'mine.py'}:make", *options, "--set", "dim=2", "--retune")[0] == 0
    assert (tmp_path / "out" / "baselines.json").read_text() == tuned


def test_evaluate_bad_rules(rule_file: Path, tmp_path: Path) -> None:
    message = error_of("evaluate", "quadratic", "--rule", "cubic")
    assert "unknown rule 'cubic'" in message
    assert "there is no file" in error_of("evaluate", "quadratic", "--rule", tmp_path / "no.safetensors")
    rule_file.write_bytes(rule_file.read_bytes()[:1000])
    assert "not a complete safetensors file" in error_of("evaluate", "quadratic", "--rule", rule_file)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "quadratic"],
        ["evaluate", "quadratic", "--rule", "RULE"],
        ["figure", "4", "--rule", "RULE"],
        ["demo"],
    ],
)
def test_unwritable_folder(rule_file: Path, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()
    command = [str(rule_file) if arg == "RULE" else arg for arg in command]
    message = error_of(*command, "--out", tmp_path / "file" / "out")
    assert "can't write to the output folder" in message


def test_numerics() -> None:
    code, printed, _ = run("numerics", "--coordinates", "64", "--steps", "2")
    assert code == 0
    for expected in ("log and sign, p = 10", "raw gradient", "d_weight_hh_2", "d_state", "last update"):
        assert expected in printed


def test_bench() -> None:
    code, printed, _ = run("bench", "--coordinates", "64")
    assert code == 0
    assert "meta-step" in printed
    assert "eager" in printed


def test_without_a_fused_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu", "triton"):
        monkeypatch.setattr(get(name), "unavailable", lambda *_: "it was not built")
    assert "no fused backend works here" in error_of("numerics", "--coordinates", "8")
    code, printed, _ = run("bench", "--coordinates", "64")
    assert code == 0
    assert "backend cpu was not timed: it was not built" in printed


def _python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, check=False)


def test_as_a_module() -> None:
    done = _python("-m", "l2l_fast")
    assert done.returncode == 0, done.stderr
    assert "backend reference" in done.stdout


def test_as_a_module_with_an_error() -> None:
    done = _python("-m", "l2l_fast", "train", "cubic")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown problem 'cubic'")
    assert "Traceback" not in done.stderr


def test_the_entry_point() -> None:
    (script,) = entry_points(group="console_scripts", name="l2l-fast")
    assert script.value == "l2l_fast.cli:main"
    assert callable(script.load())


def test_without_the_extra() -> None:
    code = "import sys; sys.modules['typer'] = None; from l2l_fast.cli import main; main(['info'])"
    done = _python("-c", code)
    assert done.returncode == 1
    assert done.stderr == "error: the command line needs typer; pip install 'l2l_fast[cli]'\n"


def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["-m", "l2l_fast", "train", "quadratic", "--updates", "300", "--threads", "1", "--out", str(out)]
    training = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (out / "checkpoint.safetensors").exists():
        assert training.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    training.send_signal(signal.SIGINT)
    _, err = training.communicate(timeout=100)
    assert training.returncode == 130
    assert f"interrupted; {out} holds a checkpoint: the same command with --resume" in err
    assert "Traceback" not in err
    assert not (out / "summary.json").exists()

    assert run(*command[2:], "--resume")[0] == 0
    uninterrupted = tmp_path / "uninterrupted"
    assert run(*command[2:-1], str(uninterrupted))[0] == 0
    resumed, expected = (CoordinatewiseLSTM.load(folder / "best.safetensors") for folder in (out, uninterrupted))
    assert torch.equal(resumed.flat_weights(), expected.flat_weights())


def test_reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TrainConfig(updates=2, horizon=4, truncation=4, batch_size=2, validation_functions=4)
    tiny = Recipe("tiny", Quadratic(), LogAndSign(), whole, "Good for nothing.")
    monkeypatch.setattr(recipes, "recipe_for", lambda name: tiny)
    code, printed, _ = run("reproduce", "tiny", "--seed", "5", "--out", tmp_path / "out")
    assert code == 0
    assert str(tmp_path / "out" / recipes.RULE) in printed.replace("\n", "")
    assert CoordinatewiseLSTM.load(tmp_path / "out" / recipes.RULE).card["name"] == "tiny"
    monkeypatch.setattr(recipes, "recipe_for", lambda name: replace(tiny, name=name))
    assert run("reproduce", "mnist", "--out", tmp_path / "shipped")[0] == 0  # whose seed is taken
    command = CoordinatewiseLSTM.load(tmp_path / "shipped" / recipes.RULE).card["command"]
    assert command == load_rule("mnist").card["command"]
    monkeypatch.undo()
    assert "there is no recipe for 'cubic'" in error_of("reproduce", "cubic", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_tune_teacher(tmp_path: Path) -> None:
    code, printed, _ = run("tune-teacher", "quadratic", "--trials", "2", "--out", tmp_path)
    assert code == 0
    assert "power" in printed
    assert json.loads((tmp_path / "teacher.json").read_text())["lr"] > 0
    assert "name the problem" in error_of("tune-teacher")


def test_tune_teacher_for_several_problems(tmp_path: Path) -> None:
    options = ("tune-teacher", "quadratic", "--trials", "1", "--out", tmp_path, "--also", "dim=3 variant=deepmind")
    assert run(*options)[0] == 0
    assert run(*options[:-2])[0] == 0
    studies = {summary.study_name for summary in optuna.get_all_study_summaries(f"sqlite:///{tmp_path / 'teacher.db'}")}
    assert len(studies) == 2
    assert any("dim=10" in name and "dim=3, variant='deepmind'" in name for name in studies)
    assert "dept" in error_of("tune-teacher", "quadratic", "--out", tmp_path / "none", "--also", "dept=3")
    assert not (tmp_path / "none").exists()
    assert "is there twice" in error_of("tune-teacher", "quadratic", "--out", tmp_path / "twice", "--also", "dim=10")


def test_what_else_a_teacher_is_judged_by_is_in_the_name_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for also in ([], ["--also", "dim=3 variant=deepmind"]):
        assert run("tune-teacher", "quadratic", "--trials", "1", *also)[0] == 0
    folders = {path.parent.name for path in tmp_path.glob("runs/*/teacher.json")}
    assert folders == {"teacher-quadratic", "teacher-quadratic+dim=3_variant=deepmind"}

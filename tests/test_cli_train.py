"""``l2l-fast train``: its options, starting from a rule, one training at a time, processes and restarts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_cli import SMALL, error_of, run

from l2l_fast import CoordinatewiseLSTM, LogAndSign, load_rule
from l2l_fast.meta.lock import hold

pytestmark = pytest.mark.usefixtures("one_thread")

VALIDATION = ["--validation-functions", "4"]


def config_of(folder: Path) -> dict[str, object]:
    config = json.loads((folder / "summary.json").read_text())["config"]
    assert isinstance(config, dict)
    return config


def test_every_setting_has_an_option(tmp_path: Path) -> None:
    options = {
        "--updates": "3", "--horizon": "6", "--truncation": "3", "--batch-size": "2", "--shards": "2",
        "--objective": "log", "--loss-power": "1.5", "--coordinate-fraction": "0.5", "--warmup": "2", "--clip": "3",
        "--clip-ratio": "4", "--average": "0.9", "--validate-every": "2", "--validation-functions": "5",
        "--checkpoint-every": "1", "--validation-seed": "7", "--validate-by": "run", "--backend": "reference",
        "--mirrored": "0.3", "--hold": "0.5",
    }  # fmt: skip
    code, _, _ = run("train", "quadratic", *(text for pair in options.items() for text in pair), "--out", tmp_path)
    assert code == 0
    expected = {name[2:].replace("-", "_"): value for name, value in options.items()}
    found = config_of(tmp_path)
    assert {name: str(found[name]) for name in expected} == expected | {"clip": "3.0", "clip_ratio": "4.0"}


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("0:6,1", [0.0] * 6 + [1.0]),
        ("1,2,3,4,5,6,7.5", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.5]),
        ("2e-1,0.5:6", [0.2] + [0.5] * 6),
    ],
)
def test_loss_weights(tmp_path: Path, text: str, weights: list[float]) -> None:
    options = ["--updates", "1", "--horizon", "6", "--truncation", "3", "--batch-size", "2", *VALIDATION]
    assert run("train", "quadratic", *options, "--loss-weights", text, "--out", tmp_path)[0] == 0
    assert config_of(tmp_path)["loss_weights"] == weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["1:100"], "must list 101 weights, one for each point of the 100 steps of a run, the start and the end incl"),
        (["1:999999999999"], "got 999999999999 in '1:999999999999'"),
        (["1:101", "--loss-power", "2"], "loss_weights and loss_power are two ways to say the same"),
        (["1:100,inf"], "loss_weights must be finite"),
        (["-1,1:100"], "loss_weights must be finite and not negative"),
        (["0:101"], "loss_weights are all 0, which trains nothing"),
        (["1:100,x"], "such as 0:100,1; got '1:100,x': could not convert string to float: 'x'"),
        (["1:100,"], "got '1:100,': could not convert string to float: ''"),
        (["1:"], "got '1:': invalid literal for int()"),
        (["1:102,2:-1"], "a count must be at least 1, not -1"),
    ],
)
def test_bad_loss_weights(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in error_of("train", "quadratic", "--out", tmp_path / "out", "--loss-weights", *options)
    assert not (tmp_path / "out").exists()


def test_no_clipping_and_no_truncation(tmp_path: Path) -> None:
    options = ["--updates", "1", "--horizon", "7", "--batch-size", "2", *VALIDATION, "--untruncated"]
    options += ["--clip-ratio", "0", "--average", "0"]
    assert run("train", "quadratic", *options, "--out", tmp_path)[0] == 0
    found = config_of(tmp_path)
    assert (found["clip"], found["clip_ratio"], found["average"]) == (None, None, None)
    assert (found["truncation"], found["horizon"]) == (7, 7)
    message = error_of("train", "quadratic", *options, "--truncation", "7", "--out", tmp_path / "other")
    assert "--untruncated and --truncation are two ways to say the same" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss-power", "-1"], "loss_power must be finite and not negative, got -1.0"),
        (["--average", "1"], "average must be below 1, got 1.0"),
        (["--clip", "-2"], "clip must be finite and positive, got -2.0"),
        (["--shards", "0"], "shards must be at least 1, got 0"),
        (["--validation-functions", "0"], "validation_functions must be at least 1, got 0"),
        (["--coordinate-fraction", "2"], "coordinate_fraction must be at most 1, got 2.0"),
        (["--truncation", "0"], "truncation must be at least 1, got 0"),
        (["--final-lr-fraction", "2"], "final_lr_fraction must be at most 1, got 2.0"),
        (["--patience", "0"], "patience must be at least 1, got 0"),
        (["--validation-seed", "0"], "seed and validation_seed are both 0"),
        (["--backend", "gpu"], "unknown backend 'gpu'; known backends: 'cpu', 'triton', 'reference'"),
        (["--backend", "cpu", "--hidden-size", "5"], "backend='cpu' can't be used: "),
        (["--p", "5"], "--p belongs to the log preprocessing"),
        (["--cuda-graph"], "a CUDA graph needs the rule on a CUDA device, it is on cpu"),
        (["--cuda-graph", "--second-derivatives"], "a CUDA graph takes the steps of first-order meta-gradients only"),
        (["--cuda-graph", "--teacher", "sgd:0.1"], "a CUDA graph can't hold the steps of a teacher"),
        (["--init-from", "cubic"], "unknown rule 'cubic'"),
        (["--init-from", "quadratic", "--p", "7"], "has settings of its own; leave out --p"),
        (["--init-from", "quadratic", "--hidden-size", "5", "--preprocess", "log"], "--preprocess and --hidden-size"),
    ],
)
def test_settings_are_refused_before_there_is_a_folder(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in error_of("train", "quadratic", *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_starts_from_a_rule(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = CoordinatewiseLSTM(5, LogAndSign(7.0), 0.3)
    own.save(tmp_path / "own.safetensors")
    for name, start in (("quadratic", load_rule("quadratic")), (str(tmp_path / "own.safetensors"), own)):
        out = tmp_path / start.spec.preprocess.__class__.__name__
        options = ["--init-from", name, "--lr", "1e-30", *SMALL, *VALIDATION, "--out", str(out)]
        assert run("train", "quadratic", *options)[0] == 0
        trained = CoordinatewiseLSTM.load(out / "best.safetensors")
        assert trained.spec == start.spec
        assert torch.equal(trained.flat_weights(), start.flat_weights())
        assert run("train", "quadratic", *options, "--resume")[0] == 0


def test_training_from_another_rule_is_not_resumed(tmp_path: Path) -> None:
    """Nor is a search, though the rules have all settings in common."""
    names = [str(tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        CoordinatewiseLSTM(preprocess=None).save(name)
    for more in ([], ["--search", "1"]):
        command = ["train", "quadratic", *SMALL, *VALIDATION, *more, "--out", str(tmp_path / f"out{len(more)}")]
        assert run(*command, "--init-from", names[0])[0] == 0
        assert "starts_from" in error_of(*command, "--init-from", names[1], "--resume")
        assert run(*command, "--init-from", names[0], "--resume")[0] == 0


def test_a_folder_in_use(tmp_path: Path) -> None:
    command = ["train", "quadratic", *SMALL, *VALIDATION, "--out", str(tmp_path)]
    with hold(tmp_path):
        for more in ([], ["--resume"], ["--search", "2"], ["--search", "2", "--resume"]):
            message = error_of(*command, *more)
            # Before the first checkpoint there is nothing to resume, whoever is at work.
            expected = "there is no file" if more == ["--resume"] else f"is in use: process {os.getpid()} on"
            assert expected in message
    assert run(*command)[0] == 0
    with hold(tmp_path):
        for more in ([], ["--resume"]):
            assert f"is in use: process {os.getpid()} on" in error_of(*command, *more)
    assert run(*command, "--resume")[0] == 0


def test_search_in_processes_with_a_problem_of_the_user(tmp_path: Path) -> None:
    """Which can't be pickled: every process makes it anew."""
    (tmp_path / "mine.py").write_text(
        "from l2l_fast.problems import Quadratic\n"
        "class Mine(Quadratic):\n"
        "    def __reduce__(self):\n"
        "        raise TypeError('not to be pickled')\n"
        "def make(dim=3):\n"
        "    return Mine(dim=dim)\n"
    )
    options = [*SMALL, *VALIDATION, "--problem", f"{tmp_path / 'mine.py'}:make", "--set", "dim=2", "--search", "2"]
    for jobs in ("1", "2"):
        code, printed, err = run("train", *options, "--jobs", jobs, "--out", tmp_path / jobs)
        assert code == 0, err
        assert "learning rates tried" in printed
    assert config_of(tmp_path / "1") == config_of(tmp_path / "2")
    one, two = (CoordinatewiseLSTM.load(tmp_path / jobs / "best.safetensors").flat_weights() for jobs in "12")
    assert torch.equal(one, two)


def test_search_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    message = error_of("train", "quadratic", *SMALL, "--search", "2", "--out", tmp_path / "out")
    assert "--search makes trials in processes of its own (--jobs), not in those of torchrun" in message


def test_a_process_started_anew_carries_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", "quadratic", *SMALL, *VALIDATION, "--checkpoint-every", "1", "--out"]
    assert run(*command, tmp_path / "whole")[0] == 0
    assert run(*command, tmp_path / "cut", "--max-seconds", "1e-9")[0] == 0
    (tmp_path / "cut" / "summary.json").unlink()
    with safe_open(tmp_path / "cut" / "checkpoint.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["progress"])["updates"] == 1
    assert "holds checkpoint.safetensors" in error_of(*command, tmp_path / "cut")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(*command, tmp_path / "cut")[0] == 0
    assert run(*command, tmp_path / "new")[0] == 0  # killed before its first checkpoint
    weights = [
        CoordinatewiseLSTM.load(tmp_path / name / "best.safetensors").flat_weights() for name in ("whole", "cut", "new")
    ]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = error_of("train", "quadratic", *SMALL, "--device", "cuda", "--out", tmp_path / "out")
    assert "--device cuda: there is no CUDA device that PyTorch can use here" in message
    assert not (tmp_path / "out").exists()


def test_diagnosis_of_a_network(tmp_path: Path) -> None:
    options = [*SMALL, *VALIDATION, "--set", "hidden=4", "--preprocess", "log", "--diagnose", "--out", str(tmp_path)]
    code, printed, _ = run("train", "digits", *options)
    assert code == 0
    assert "saturated gates, layer 2" in printed

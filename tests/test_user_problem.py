"""Problems from a file of the user's: loaded, tried and, where something is wrong, explained."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent, indent

import pytest
import torch

import l2l_fast
from l2l_fast.problems.user import load_problem, parse_settings

BOWL = """
from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Bowl:
    dim: int = 2
    name: str = "bowl"

    def sample(self, batch_size, *, generator=None, device=None):
        return Instances(torch.randn(batch_size, self.dim, generator=generator).to(device))


class Instances:
    def __init__(self, centre):
        self.centre = centre

    def init(self, *, generator=None):
{init}

    def loss(self, params, *, generator=None):
{loss}
"""
INIT = 'return {"x": torch.randn(self.centre.shape, generator=generator)}'
LOSS = 'return (params["x"] - self.centre).square().sum(1)'

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file and returns its path as text."""

    def write_file(text: str, name: str = "mine.py") -> str:
        path = tmp_path / name
        path.write_text(dedent(text), encoding="utf-8")
        return str(path)

    return write_file


def bowl(init: str = INIT, loss: str = LOSS) -> str:
    return BOWL.format(init=indent(dedent(init), " " * 8), loss=indent(dedent(loss), " " * 8))


def test_loads_a_problem_to_train_on(write: Write) -> None:
    problem = load_problem(f"{write(bowl())}:Bowl", {"dim": 3, "name": "round"})
    assert repr(problem) == "Bowl(dim=3, name='round')"
    config = l2l_fast.TrainConfig(updates=2, horizon=2, truncation=2, batch_size=2, validation_functions=2)
    rule = l2l_fast.CoordinatewiseLSTM(hidden_size=4)
    assert l2l_fast.MetaTrainer(rule, problem, config).fit().updates == 2


def test_loads_a_module_problem(write: Write) -> None:
    text = """
        import torch
        from l2l_fast.problems.module import module_problem

        def regression(width=3):
            inputs = torch.linspace(-1, 1, 50)[:, None]
            net = lambda: torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
            return module_problem(net, torch.nn.functional.mse_loss, (inputs, inputs.sin()), minibatch=10)
    """
    problem = load_problem(f"{write(text)}:regression", parse_settings(["width=5"]))
    params = problem.sample(2).init()
    assert params["0.weight"].shape == (2, 5, 1)


def test_a_file_imports_what_lies_beside_it(write: Write) -> None:
    write(bowl(), "beside_the_problem.py")
    before = list(sys.path)
    reference = write("from beside_the_problem import Bowl\ndef make(): return Bowl(dim=4)")
    try:
        assert repr(load_problem(f"{reference}:make")).startswith("Bowl(dim=4")
    finally:
        sys.modules.pop("beside_the_problem", None)
    assert sys.path == before


def test_loads_from_a_module(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repr(load_problem("l2l_fast.problems:Quadratic", {"dim": 3})) == "Quadratic(dim=3, variant='gaussian')"
    write(bowl(), "in_the_current_folder.py")
    monkeypatch.chdir(tmp_path)
    try:
        assert repr(load_problem("in_the_current_folder:Bowl")).startswith("Bowl(dim=2")
    finally:
        sys.modules.pop("in_the_current_folder", None)


def test_loads_again_what_has_changed(write: Write) -> None:
    reference = f"{write(bowl())}:Bowl"
    load_problem(reference)
    write(bowl().replace("dim: int = 2", "dim: int = 17"))
    assert repr(load_problem(reference)).startswith("Bowl(dim=17")


def test_leaves_the_global_random_numbers_alone(write: Write) -> None:
    before = torch.get_rng_state()
    load_problem(f"{write(bowl())}:Bowl")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reference", ["mine.py", "mine", ":make", "mine.py:", ""])
def test_rejects_a_reference_of_another_form(reference: str) -> None:
    with pytest.raises(ValueError, match=re.escape("path/to/file.py:factory or package.module:factory, got")):
        load_problem(reference)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = 1 / 0\n", r"could not be imported: .*mine\.py, line 2: ZeroDivisionError: division by zero"),
        ("x = (\n", r"could not be imported: SyntaxError: .*mine\.py, line 1"),
        ("import there_is_no_such_module\n", r"mine\.py, line 1: ModuleNotFoundError: .*there_is_no_such_module"),
        ("import sys\nsys.exit(2)\n", r"mine\.py, line 2: SystemExit: 2"),
        ("def other(): pass\n_hidden = print\n", "there is no 'make'; defined there: 'other'$"),
        ("x = 1\n", "there is no 'make'; defined there: nothing$"),
        ("def make():\n    return helper()\ndef helper():\n    raise OSError('gone')\n", r"line 4: OSError: gone"),
        ("def make(dim): return dim\n", r"failed at make\(\): TypeError: .*'dim'"),
    ],
)
def test_explains_what_fails_in_the_file(write: Write, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_problem(f"{write(text)}:make")
    if "there is no" not in message:
        assert caught.value.__cause__ is not None


def test_a_file_that_fails_leaves_no_module_behind(write: Write) -> None:
    before = set(sys.modules)
    with pytest.raises(ValueError, match="could not be imported"):
        load_problem(f"{write('x = 1 / 0', 'fails.py')}:make")
    assert set(sys.modules) == before


def test_explains_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*missing\.py"):
        load_problem(f"{tmp_path / 'missing.py'}:make")
    with pytest.raises(
        ValueError, match="could not be imported: ModuleNotFoundError: No module named 'no_such_module'"
    ):
        load_problem("no_such_module:make")


def test_explains_a_setting_that_the_factory_does_not_take(write: Write) -> None:
    with pytest.raises(
        ValueError, match=r"failed at Bowl\(width=3\): TypeError: .*unexpected keyword argument 'width'"
    ):
        load_problem(f"{write(bowl())}:Bowl", {"width": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("make = 3", "must be a function that makes a problem, got int"),
        ("def make(): return 3", r"must return a problem, an object with the method sample\(.*got 3"),
        ("class P: pass\ndef make(): return P", "must return a problem, an object with the method sample"),
        ("class make:\n    def sample(self, n, **_): return 3", "methods init and loss, got int without init and loss"),
    ],
)
def test_rejects_what_is_no_problem(write: Write, text: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        load_problem(f"{write(text)}:make")


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        ("return {}", TypeError, "init must return a dict of tensors, at least one, got {}"),
        ("return [self.centre]", TypeError, "init must return a dict of tensors"),
        ("return {'x': 1.0}", TypeError, "must return tensors of floating point, got float for 'x'"),
        ("return {'x': self.centre.long()}", TypeError, r"of floating point, got torch\.int64 for 'x'"),
        ("return {'x': self.centre[0]}", ValueError, "here 2, got shape .3,. for 'x'"),
        ("return {'x': self.centre.sum()}", ValueError, r"here 2, got shape \(\) for 'x'"),
        ("return {'x': torch.randn(2, 3)}", ValueError, r"same state of the generator gave losses .* then .* draw all"),
        ("raise KeyError('x')", ValueError, r"failed at init\(.* line 23: KeyError: 'x'"),
    ],
)
def test_rejects_starting_points(write: Write, init: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_problem(f"{write(bowl(init=init))}:Bowl", {"dim": 3})


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ("return 1.0", TypeError, "loss must return a tensor, got float"),
        ("return params['x'].sum()", ValueError, r"one loss per instance, shape \(2,\), got \(\)"),
        ("return params['x'].sum(1, keepdim=True)", ValueError, r"shape \(2,\), got \(2, 1\)"),
        ("return params['x'].sum(1) / 0", ValueError, "the losses at the starting points must be finite"),
        ("return params['x'].detach().sum(1)", ValueError, "no gradient, because it does not depend on the parameters"),
        ("return self.centre.requires_grad_().sum(1)", ValueError, "no gradient, because it does not depend on the"),
        ("return (params['x'] * 0).sqrt().sum(1)", ValueError, "the gradient by 'x' at the starting point must be fin"),
        ("return params['x'].mean().expand(2)", ValueError, "the loss of an instance depends on 'x' of another one"),
        ("return params['y'].sum(1)", ValueError, r"failed at loss\(.* line 26: KeyError: 'y'"),
    ],
)
def test_rejects_losses(write: Write, loss: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_problem(f"{write(bowl(loss=loss))}:Bowl", {"dim": 3})


def test_settings_are_literals_or_text() -> None:
    items = [
        "hidden=40",
        "layers=(20, 20)",
        "activation=relu",
        "scale=1e-2",
        "flag=True",
        "name=a=b",
        "empty=",
        "s='3'",
    ]
    assert parse_settings(items) == {
        "hidden": 40,
        "layers": (20, 20),
        "activation": "relu",
        "scale": 0.01,
        "flag": True,
        "name": "a=b",
        "empty": "",
        "s": "3",
    }
    assert parse_settings([]) == {}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["hidden"], "a setting has the form name=value, got 'hidden'"),
        (["=3"], "a setting has the form name=value, got '=3'"),
        (["two words=3"], "a setting has the form name=value, got 'two words=3'"),
        (["a=1", "a=2"], "the setting 'a' is given twice"),
        (["nesterov=false"], "write nesterov=False as in Python, got 'nesterov=false'"),
    ],
)
def test_rejects_settings(items: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings(items)

"""Problems from a file or module of the user's, and settings as text."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from l2l_fast.problems import Instances, Problem

_TRIED = 2  # instances that a problem is tried on: the fewest that can be told from each other


def load_problem(reference: str, settings: Mapping[str, object] | None = None) -> Problem:
    """The problem that a factory of the user's makes, tried on two instances.

    The code of the file is run, as by ``import``: load what you trust. What lies beside the file can be imported by
    it, and for a module what lies in the current folder.

    Args:
        reference: ``"path/to/file.py:factory"`` or ``"package.module:factory"``.
        settings: keyword arguments of the factory, :func:`parse_settings` makes them of text.

    Raises:
        TypeError: if what the factory returns, or a method of it, has the wrong kind.
        ValueError: if the reference leads nowhere, the code fails (its error is the cause), or the problem breaks the
            protocol: shapes, losses or gradients that are not finite, no gradient, instances that depend on each
            other, randomness that does not come from the generator.
    """
    location, colon, factory_name = reference.rpartition(":")
    if not (location and colon and factory_name):
        raise ValueError(
            f"a problem of yours is given as path/to/file.py:factory or package.module:factory, got {reference!r}"
        )
    path = Path(location).resolve() if location.endswith(".py") else None
    if path is not None and not path.is_file():
        raise ValueError(f"{reference}: there is no file {path}")
    settings = settings or {}
    with _importable(Path.cwd() if path is None else path.parent):
        with _explained(reference, "could not be imported", path):
            module = importlib.import_module(location) if path is None else _import_file(path)
        path = Path(getattr(module, "__file__", None) or location)
        factory = _find(reference, module, factory_name)
        arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        with _explained(reference, f"failed at {factory_name}({arguments})", path):
            problem = factory(**settings)
        _try(reference, problem, path)
    return cast("Problem", problem)


def parse_settings(items: Sequence[str]) -> dict[str, object]:
    """``["hidden=40", "activation=relu"]`` as ``{"hidden": 40, "activation": "relu"}``.

    Values are Python literals, or else text as it is.

    Raises:
        ValueError: if an item is not of the form name=value, a name comes twice, or a value is ``true`` or ``false``,
            which as text would be true either way.
    """
    settings: dict[str, object] = {}
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip()
        if not (equals and name.isidentifier()):
            raise ValueError(f"a setting has the form name=value, got {item!r}")
        if name in settings:
            raise ValueError(f"the setting {name!r} is given twice")
        if text.strip() in ("true", "false"):
            raise ValueError(f"write {name}={text.strip().capitalize()} as in Python, got {item!r}")
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            settings[name] = text
    return settings


def _import_file(path: Path) -> ModuleType:
    name = f"_l2l_fast_problem_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _find(reference: str, module: ModuleType, name: str) -> Callable[..., object]:
    factory = getattr(module, name, None)
    if factory is None:
        known = [
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
        raise ValueError(
            f"{reference}: there is no {name!r}; defined there: {', '.join(map(repr, known)) or 'nothing'}"
        )
    if not callable(factory):
        raise TypeError(f"{reference} must be a function that makes a problem, got {type(factory).__name__}")
    return cast("Callable[..., object]", factory)


def _try(reference: str, problem: object, path: Path) -> None:
    """Sample two instances, and take a loss and its gradient, as any training will."""
    if isinstance(problem, type) or not callable(getattr(problem, "sample", None)):
        raise TypeError(
            f"{reference} must return a problem, an object with the method sample(batch_size, *, generator, device), "
            f"got {problem!r}"
        )
    params, losses = _first_losses(reference, cast("Problem", problem), path)
    _check_independent(reference, params, losses)
    _, again = _first_losses(reference, cast("Problem", problem), path)
    if not torch.allclose(losses, again, rtol=1e-3):
        raise ValueError(
            f"{reference}: the same state of the generator gave losses {losses.tolist()}, then {again.tolist()}; "
            "draw all random numbers from the generator handed in"
        )


def _first_losses(reference: str, problem: Problem, path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Starting points that require grad, and their losses ``[2]``."""
    generator = torch.Generator().manual_seed(0)
    with _explained(reference, f"failed at sample({_TRIED}, generator=..., device='cpu')", path):
        instances = problem.sample(_TRIED, generator=generator, device="cpu")
    _check_instances(reference, instances)
    with _explained(reference, "failed at init(generator=...) of its instances", path):
        params = instances.init(generator=generator)
    _check_params(reference, params)
    params = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    with torch.enable_grad(), _explained(reference, "failed at loss(params, generator=...) of its instances", path):
        losses = instances.loss(params, generator=generator)
    if not isinstance(losses, Tensor):
        raise TypeError(f"{reference}: loss must return a tensor, got {type(losses).__name__}")
    if losses.shape != (_TRIED,):
        raise ValueError(
            f"{reference}: loss must return one loss per instance, shape ({_TRIED},), got {tuple(losses.shape)}"
        )
    if not losses.isfinite().all():
        raise ValueError(f"{reference}: the losses at the starting points must be finite, got {losses.tolist()}")
    return params, losses


def _check_instances(reference: str, instances: Instances) -> None:
    missing = [name for name in ("init", "loss") if not callable(getattr(instances, name, None))]
    if missing:
        raise TypeError(
            f"{reference}: sample must return instances with the methods init and loss, "
            f"got {type(instances).__name__} without {' and '.join(missing)}"
        )


def _check_params(reference: str, params: object) -> None:
    if not isinstance(params, Mapping) or not params:
        raise TypeError(f"{reference}: init must return a dict of tensors, at least one, got {params!r}")
    for name, tensor in params.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{reference}: init must return tensors of floating point, got {kind} for {name!r}")
        if tensor.dim() == 0 or tensor.shape[0] != _TRIED:
            raise ValueError(
                f"{reference}: init must return tensors with the instances as leading dimension, here {_TRIED}, "
                f"got shape {tuple(tensor.shape)} for {name!r}"
            )


def _check_independent(reference: str, params: Mapping[str, Tensor], losses: Tensor) -> None:
    """The first loss depends on the first instance, and on no other."""
    grads: tuple[Tensor | None, ...] = (None,)
    if losses.requires_grad:
        grads = torch.autograd.grad(losses[0], list(params.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(params, grads, strict=False) if grad is not None}
    if not found:
        raise ValueError(f"{reference}: the loss has no gradient, because it does not depend on the parameters")
    for name, grad in found.items():
        if not grad.isfinite().all():
            raise ValueError(f"{reference}: the gradient by {name!r} at the starting point must be finite")
        if grad[1:].count_nonzero():
            raise ValueError(
                f"{reference}: the loss of an instance depends on {name!r} of another one; "
                "row b of the losses may depend on row b of the parameters only"
            )


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Inside, modules in ``folder`` can be imported."""
    entry = os.fspath(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code may have changed the path too
            sys.path.remove(entry)


@contextmanager
def _explained(reference: str, what: str, path: Path | None) -> Iterator[None]:
    """Whatever the user's code raises becomes a ``ValueError`` that names the line in ``path``, if it went there."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{reference} {what}: {_place(error, path)}{type(error).__name__}: {error}") from error


def _place(error: BaseException, path: Path | None) -> str:
    """``"file, line 3: "``, the last line of ``path`` on the way to the error."""
    if path is None:
        return ""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == path.resolve()
    ]
    return f"{path}, line {lines[-1]}: " if lines else ""

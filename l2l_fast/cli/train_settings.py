"""What the options of ``l2l-fast train`` come to, or why they are refused."""

from __future__ import annotations

from enum import Enum

import torch

from l2l_fast.backends import resolve
from l2l_fast.meta import Teacher, TrainConfig
from l2l_fast.meta.graph import check_graph
from l2l_fast.meta.imitation import check_teaching
from l2l_fast.problems import Problem
from l2l_fast.rule import CoordinatewiseLSTM, as_rule
from l2l_fast.spec import LogAndSign, RuleSpec


class PreprocessName(str, Enum):
    """What becomes of a gradient before it enters the rule."""

    LOG = "log"
    NONE = "none"


class DeviceName(str, Enum):
    """Where to train."""

    CPU = "cpu"
    CUDA = "cuda"


def usable_device(device: DeviceName) -> torch.device:
    """``device``, if there is one.

    Raises:
        ValueError: if there is none.
    """
    if device is DeviceName.CUDA and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device that PyTorch can use here; --device cpu always works")
    return torch.device(device.value)


def chosen_truncation(given: int | None, horizon: int, *, whole_runs: bool) -> int:
    if given is not None:
        return given
    return horizon if whole_runs else TrainConfig.truncation


def parse_loss_weights(text: str, horizon: int) -> tuple[float, ...]:
    """The weights that ``text`` lists: numbers with commas between them, ``number:count`` for several of the same.

    Raises:
        ValueError: if it is no such list, or not one of ``horizon + 1`` weights.
    """
    try:
        runs = [_parse_run(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--loss-weights must be numbers with commas between them, with :COUNT after one that is repeated, such as "
            f"0:{horizon},1; got {text!r}: {error}"
        ) from error
    total = sum(count for _, count in runs)
    if total != horizon + 1:  # before there is a list of that length
        raise ValueError(
            f"--loss-weights must list {horizon + 1} weights, one for each point of the {horizon} steps of a run, the "
            f"start and the end included, got {total} in {text!r}"
        )
    return tuple(weight for weight, count in runs for _ in range(count))


def _parse_run(text: str) -> tuple[float, int]:
    """A weight and how often it is repeated."""
    weight, colon, count = text.partition(":")
    repeated = int(count) if colon else 1
    if repeated < 1:
        raise ValueError(f"a count must be at least 1, not {repeated}")
    return float(weight), repeated


def initial_rule(
    init_from: str | None,
    preprocess: PreprocessName | None,
    p: float | None,
    output_scale: float | None,
    hidden_size: int | None,
    seed: int,
) -> CoordinatewiseLSTM:
    """The rule that training starts from: that of ``init_from``, or a fresh one.

    Raises:
        ValueError: if there is no such rule, or options say again, or otherwise, what it is made of.
    """
    if init_from is not None:
        options = {"preprocess": preprocess, "p": p, "output-scale": output_scale, "hidden-size": hidden_size}
        given = [f"--{name}" for name, value in options.items() if value is not None]
        if given:
            raise ValueError(f"the rule of --init-from has settings of its own; leave out {' and '.join(given)}")
        return as_rule(init_from)
    if p is not None and preprocess is not PreprocessName.LOG:
        raise ValueError("--p belongs to the log preprocessing; add --preprocess log, or leave it out")
    torch.manual_seed(seed)
    return CoordinatewiseLSTM(
        RuleSpec.hidden_size if hidden_size is None else hidden_size,
        LogAndSign(LogAndSign.p if p is None else p) if preprocess is PreprocessName.LOG else None,
        RuleSpec.output_scale if output_scale is None else output_scale,
    )


def check_usable(rule: CoordinatewiseLSTM, problem: Problem, config: TrainConfig, teacher: Teacher | None) -> None:
    """Refuse settings that only have a meaning, or not, for this very rule, problem and teacher.

    Raises:
        TypeError: if a CUDA graph can't hold losses of the problem.
        ValueError: if a setting has no meaning with a teacher or on this device.
        RuntimeError: if the backend can't run the rule.
    """
    if teacher is not None:
        check_teaching(rule, config)
    weights = rule.output.weight
    resolve(config.backend, weights.device, weights.dtype, rule.spec)
    if config.cuda_graph:
        check_graph(rule, problem)

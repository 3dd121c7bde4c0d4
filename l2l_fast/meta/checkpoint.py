"""The file from which interrupted meta-training carries on, bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from l2l_fast.files import load_tensors, save_atomically
from l2l_fast.meta.config import FREE_FIELDS, TrainConfig
from l2l_fast.meta.distributed import job
from l2l_fast.meta.log import LogRow
from l2l_fast.rule import CoordinatewiseLSTM

FORMAT = "l2l_fast.checkpoint.v2"

# Settings that a checkpoint or search of before there were any does not name, and what was done then.
FORMER = {"mirrored": 0.0, "hold": 0.0}


@dataclass
class Progress:
    """The numbers that describe how far training has come.

    Attributes:
        updates: meta-updates done, skipped ones included.
        seconds: seconds of training.
        position: steps done of the current run of every shard; 0 if the next update starts one.
        skipped, skipped_in_a_row: updates skipped for want of a finite loss and meta-gradient.
        segments, loss_sum, grad_norm_sum: what was summed up since the last validation.
        running_norm: mean norm of the meta-gradients so far, the latest ones weighted most; 0 before the first.
        best_update: after how many updates the best rule was found.
        returned: after how many updates training went back to the best rule the last time; 0 if it never did.
        history: a row per validation.
    """

    updates: int = 0
    seconds: float = 0.0
    position: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    segments: int = 0
    loss_sum: float = 0.0
    grad_norm_sum: float = 0.0
    running_norm: float = 0.0
    best_update: int = 0
    returned: int = 0
    history: list[LogRow] = field(default_factory=list)

    @property
    def best_validation_loss(self) -> float:
        return self.history[-1].best_validation_loss if self.history else float("inf")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        history = [LogRow(**row) for row in values.pop("history")]
        return cls(**values, history=history)


def describe(
    rule: nn.Module,
    problem: object,
    config: TrainConfig,
    teacher: object | None = None,
    starts_from: str | None = None,
) -> dict[str, Any]:
    """What training is about, as JSON-compatible values: two trainings with the same description are the same."""
    if isinstance(rule, CoordinatewiseLSTM):
        about_rule: dict[str, Any] = {"type": type(rule).__name__, **rule.spec.to_dict()}
    else:
        about_rule = {
            "type": type(rule).__name__,
            "weights": {name: list(tensor.shape) for name, tensor in rule.state_dict().items()},
        }
    about = {"rule": about_rule, "problem": describe_problem(problem), "config": config.to_dict()}
    if starts_from is not None:
        about["starts_from"] = starts_from
    if teacher is not None:
        # The repr of a function holds an address, which differs from process to process.
        about["teacher"] = getattr(teacher, "__qualname__", None) or describe_problem(teacher)
    return about


def save(path: str | os.PathLike[str], tensors: dict[str, Tensor], about: dict[str, Any], progress: Progress) -> None:
    """Write a checkpoint, atomically.

    Raises:
        OSError: if the folder can't be written; an existing file is left as it is.
    """
    metadata = {"format": FORMAT, "about": json.dumps(about), "progress": json.dumps(asdict(progress)), "job": job()}
    # Copies, because parameters of a run are views of one tensor, which the format refuses to share.
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_atomically(copies, metadata, path)


def written_by(path: str | os.PathLike[str]) -> str | None:
    """The job that wrote the checkpoint; ``None`` if it is damaged."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return (file.metadata() or {}).get("job")
    except SafetensorError:
        return None


def load(path: str | os.PathLike[str], about: dict[str, Any]) -> tuple[dict[str, Tensor], Progress]:
    """The tensors, on the CPU, and the progress in a checkpoint of the training that ``about`` describes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, of another format, or of another training, naming what differs.
    """
    tensors, metadata = load_tensors(path, FORMAT)
    try:
        found, progress = json.loads(metadata["about"]), Progress.from_dict(json.loads(metadata["progress"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is a checkpoint without readable metadata: {error!r}") from error
    if "config" in found:
        found["config"] = FORMER | found["config"]
    here, there, missing = flatten(json.loads(json.dumps(about))), flatten(found), object()
    differing = [
        f"{name} is {there.get(name, 'absent')!r} in the checkpoint but {here.get(name, 'absent')!r} here"
        for name in sorted(here.keys() | there.keys())
        if name.removeprefix("config.") not in FREE_FIELDS and here.get(name, missing) != there.get(name, missing)
    ]
    if differing:
        raise ValueError(
            f"{os.fspath(path)} belongs to another training: {'; '.join(differing)}. Resume with the settings it was "
            f"started with (only {', '.join(sorted(FREE_FIELDS))} may change; defaults may have, and what is None "
            "there is 0 for an option), or train in another folder"
        )
    # Copies, because results to the bit need the alignment that PyTorch gives its own tensors.
    return {name: tensor.clone() for name, tensor in tensors.items()}, progress


def flatten(about: dict[str, Any]) -> dict[str, Any]:
    """``{"config": {"lr": ...}}`` as ``{"config.lr": ...}``."""
    flat: dict[str, Any] = {}
    for group, values in about.items():
        if isinstance(values, dict):
            flat |= {f"{group}.{name}": value for name, value in values.items()}
        else:
            flat[group] = values
    return flat


def select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def describe_problem(problem: object) -> str:
    """Its ``repr``, or one made of its public attributes that are plain values."""
    if type(problem).__repr__ is not object.__repr__:
        return repr(problem)
    # The default repr holds an address, which differs from process to process.
    attributes = sorted(getattr(problem, "__dict__", {}).items())
    settings = [f"{name}={value!r}" for name, value in attributes if not name.startswith("_") and _is_plain(value)]
    return f"{type(problem).__qualname__}({', '.join(settings)})"


def _is_plain(value: object) -> bool:
    """Whether JSON can express ``value``."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True

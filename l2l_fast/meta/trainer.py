"""Meta-training: truncated backpropagation through runs of a rule on fresh problem instances."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from l2l_fast.meta import checkpoint
from l2l_fast.meta.checkpoint import Progress
from l2l_fast.meta.config import TrainConfig
from l2l_fast.meta.interrupt import DeferredSignals
from l2l_fast.meta.log import LogRow, TrainEvent, write_log
from l2l_fast.meta.unroll import unroll
from l2l_fast.problems import Evaluates, Instances, Problem
from l2l_fast.rule import CoordinatewiseLSTM

MAX_SKIPPED_IN_A_ROW = 100

_NORM_DECAY = 0.95  # of the running mean of gradient norms

CHECKPOINT, BEST, LOG, SUMMARY = "checkpoint.safetensors", "best.safetensors", "log.csv", "summary.json"

StopReason = Literal["updates", "patience", "max_seconds"]


@dataclass(frozen=True)
class TrainResult:
    """What :meth:`MetaTrainer.fit` returns.

    Attributes:
        best_rule: the rule of the best validation.
        best_validation_loss: its mean loss after the last step.
        best_update: after how many updates it was found; 0 if it is the untrained rule.
        history: a row per validation.
        updates: meta-updates done.
        seconds: seconds of training, over all calls.
        stopped: why training ended.
    """

    best_rule: nn.Module
    best_validation_loss: float
    best_update: int
    history: tuple[LogRow, ...]
    updates: int
    seconds: float
    stopped: StopReason


@dataclass
class _Run:
    """Where the current run on a batch of instances stands."""

    instances: Instances
    generator_state: Tensor  # from which the instances can be drawn again
    params: Mapping[str, Tensor] | None = None
    state: Tensor | None = None


class MetaTrainer:
    """Trains ``rule`` on instances of ``problem``.

    Args:
        rule: a :class:`CoordinatewiseLSTM`, or any module that :func:`unroll` takes; trained in place,
            while the best one is in the result.
        problem: where instances come from.
        config: settings; ``None`` is :class:`TrainConfig` as it is.
        folder: where to keep ``checkpoint.safetensors``, ``log.csv``, ``summary.json`` and, of a
            :class:`CoordinatewiseLSTM`, ``best.safetensors`` (a rule file); made if need be. ``None`` keeps nothing.

    Raises:
        TypeError: if an argument has the wrong kind.
        ValueError: if no weight of the rule requires grad.

    Source: Andrychowicz et al. 2016, sections 2 and 3.
    """

    def __init__(
        self,
        rule: nn.Module,
        problem: Problem,
        config: TrainConfig | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(rule, nn.Module):
            raise TypeError(f"rule must be a module, got {type(rule).__name__}")
        if isinstance(problem, type) or not callable(getattr(problem, "sample", None)):
            raise TypeError(f"problem must be an object with a sample method, got {problem!r}")
        if config is not None and not isinstance(config, TrainConfig):
            raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
        self.rule = rule
        self.problem = problem
        self.config = config or TrainConfig()
        self.folder = None if folder is None else Path(folder)
        self._weights = [weight for weight in rule.parameters() if weight.requires_grad]
        if not self._weights:
            raise ValueError("the rule has no weight that requires grad, so there is nothing to train")
        self._device = self._weights[0].device
        self._optimizer = torch.optim.Adam(self._weights, lr=self.config.lr, fused=True)
        self._generator = torch.Generator().manual_seed(self.config.seed)
        self._progress = Progress()
        self._run: _Run | None = None
        # What is validated: the rule itself, or a copy with the average of its weights.
        self._judged = rule if self.config.average is None else copy.deepcopy(rule)
        self._best = _copy_weights(rule)
        # Taken now: a problem may change while it is sampled from.
        self._about = checkpoint.describe(rule, problem, self.config)
        self._begun = False  # whether the folder holds a checkpoint of this very training

    @property
    def best_rule(self) -> nn.Module:
        """A copy of the rule as it was at the best validation so far."""
        best = copy.deepcopy(self.rule)
        best.load_state_dict(self._best)
        if isinstance(best, CoordinatewiseLSTM):
            best.card = {
                "problem": self._about["problem"],
                "config": self._about["config"],
                "updates": self._progress.best_update,
                "validation_loss": _finite_or_none(self._progress.best_validation_loss),
            }
        return best

    def fit(self, *, resume: bool = False, on_update: Callable[[TrainEvent], None] | None = None) -> TrainResult:
        """Train until ``config.updates`` updates are done, or patience or time run out.

        Ctrl-C and SIGTERM take effect after the current update, once a checkpoint is written. Called
        again, it carries on where it stopped.

        Args:
            resume: carry on from the checkpoint in the folder; the result is that of training which was
                never interrupted, to the bit.
            on_update: called after every update.

        Raises:
            FileExistsError: if the folder holds files of an earlier training and ``resume`` is false.
            FileNotFoundError: if there is no checkpoint to resume from.
            OSError: if the folder can't be written.
            ValueError: if the checkpoint is damaged or belongs to another training.
            FloatingPointError: if 100 updates in a row have a loss or meta-gradient that is not finite.
        """
        self._open(resume)
        begin = time.perf_counter()
        before = self._progress.seconds
        with DeferredSignals() as signals:
            if not self._progress.history:
                self._validate()
            self._save()
            self._begin_log()
            while (stopped := self._stopped(self._progress.seconds - before)) is None:
                lr, loss, grad_norm = self._update()
                self._progress.seconds = before + time.perf_counter() - begin
                validation_loss = self._validate() if self._progress.updates % self.config.validate_every == 0 else None
                if self._progress.updates % (self.config.checkpoint_every or self.config.validate_every) == 0:
                    self._save()
                if on_update is not None:
                    on_update(self._event(lr, loss, grad_norm, validation_loss))
                if signals.received is not None:
                    self._save()
                    signals.deliver()
            if self._progress.history[-1].update != self._progress.updates and stopped == "updates":
                self._validate()
            self._save()
        result = self._result(stopped)
        if self.folder is not None:
            self._write_summary(result)
        return result

    def _stopped(self, seconds: float) -> StopReason | None:
        progress, config = self._progress, self.config
        if progress.updates >= config.updates:
            return "updates"
        if config.patience is not None:
            last = progress.history[-1].update
            if sum(progress.best_update < row.update <= last for row in progress.history) >= config.patience:
                return "patience"
        if config.max_seconds is not None and seconds >= config.max_seconds:
            return "max_seconds"
        return None

    def _update(self) -> tuple[float, float, float]:
        """One segment and, if its loss and gradient are finite, one step of Adam: ``(lr, loss, gradient norm)``."""
        config, progress = self.config, self._progress
        if self._run is None:
            self._run = self._start_run()
        steps = min(config.truncation, config.horizon - progress.position)
        segment = unroll(
            self.rule,
            self._run.instances,
            steps,
            params=self._run.params,
            state=self._run.state,
            generator=self._generator,
            loss_weights=config.weights_between(progress.position, progress.position + steps),
            objective=config.objective,
            second_derivatives=config.second_derivatives,
            coordinate_fraction=config.coordinate_fraction,
            backend=config.backend,
        )
        self._optimizer.zero_grad()
        segment.loss.backward()  # type: ignore[no-untyped-call]
        norm = get_total_norm([weight.grad for weight in self._weights if weight.grad is not None])
        lr, loss, grad_norm = config.lr_at(progress.updates), segment.loss.item(), norm.item()
        self._run.params, self._run.state = segment.params, segment.state
        progress.updates += 1
        progress.position += steps
        if math.isfinite(loss) and math.isfinite(grad_norm):
            limit = self._norm_limit(grad_norm)
            if grad_norm > limit:
                clip_grads_with_norm_(self._weights, limit, norm)
            self._optimizer.param_groups[0]["lr"] = lr
            self._optimizer.step()
            self._take_average()
            progress.skipped_in_a_row = 0
            progress.segments += 1
            progress.loss_sum += loss
            progress.grad_norm_sum += grad_norm
        else:
            self._skip()
        if progress.position >= config.horizon:
            self._run, progress.position = None, 0
        return lr, loss, grad_norm

    def _norm_limit(self, grad_norm: float) -> float:
        """The greatest norm that a meta-gradient of ``grad_norm`` may keep; the running mean takes it in."""
        config, progress = self.config, self._progress
        limit = math.inf if config.clip is None else config.clip
        running = progress.running_norm or grad_norm
        if config.clip_ratio is not None:
            limit = min(limit, config.clip_ratio * running)
        progress.running_norm = _NORM_DECAY * running + (1 - _NORM_DECAY) * min(grad_norm, limit)
        return limit

    @torch.no_grad()
    def _take_average(self) -> None:
        if self.config.average is None:
            return
        # Shorter while there is little to average, so that the untrained rule is soon forgotten.
        updates = self._progress.updates - self._progress.skipped
        decay = min(self.config.average, updates / (updates + 10))
        for mean, weight in zip(self._judged.parameters(), self.rule.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)

    def _skip(self) -> None:
        """Count an update that could not be made, and leave the run that has gone astray."""
        progress = self._progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        progress.position = self.config.horizon
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{MAX_SKIPPED_IN_A_ROW} meta-updates in a row had a loss or meta-gradient that is not finite; lower "
                f"lr (now {self.config.lr:g}), set clip (now {self.config.clip}) or shorten truncation "
                f"(now {self.config.truncation})"
            )

    def _start_run(self) -> _Run:
        generator_state = self._generator.get_state()
        instances = self.problem.sample(self.config.batch_size, generator=self._generator, device=self._device)
        return _Run(instances, generator_state)

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss after the last step on the validation instances; a row of the history.

        It is that of the averaged weights, if there are any, and free of minibatch noise where instances allow it.
        """
        config, progress = self.config, self._progress
        generator = torch.Generator().manual_seed(config.validation_seed)
        instances = self.problem.sample(config.validation_functions, generator=generator, device=self._device)
        run = unroll(self._judged, instances, config.horizon, generator=generator, backend=config.backend)
        losses = instances.evaluate(run.params) if isinstance(instances, Evaluates) else run.losses[-1]
        validation_loss = losses.double().mean().item()
        if not math.isfinite(validation_loss):
            validation_loss = math.inf
        if not progress.history or validation_loss < progress.best_validation_loss:
            self._best = _copy_weights(self._judged)
            progress.best_update = progress.updates
        row = LogRow(
            update=progress.updates,
            seconds=progress.seconds,
            lr=config.lr_at(progress.updates),
            loss=progress.loss_sum / progress.segments if progress.segments else None,
            grad_norm=progress.grad_norm_sum / progress.segments if progress.segments else None,
            skipped=progress.skipped,
            validation_loss=validation_loss,
            best_validation_loss=min(validation_loss, progress.best_validation_loss),
        )
        progress.history.append(row)
        progress.segments, progress.loss_sum, progress.grad_norm_sum = 0, 0.0, 0.0
        if self.folder is not None and self._begun:
            write_log(self.folder / LOG, [row], append=True)
        return validation_loss

    def _event(self, lr: float, loss: float, grad_norm: float, validation_loss: float | None) -> TrainEvent:
        progress = self._progress
        return TrainEvent(
            update=progress.updates,
            updates=self.config.updates,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            seconds=progress.seconds,
            skipped=progress.skipped,
            validation_loss=validation_loss,
            best_validation_loss=progress.best_validation_loss,
        )

    def _result(self, stopped: StopReason) -> TrainResult:
        progress = self._progress
        return TrainResult(
            best_rule=self.best_rule,
            best_validation_loss=progress.best_validation_loss,
            best_update=progress.best_update,
            history=tuple(progress.history),
            updates=progress.updates,
            seconds=progress.seconds,
            stopped=stopped,
        )

    def _open(self, resume: bool) -> None:
        """Look at the folder, and restore what is to be resumed; no file is written before the first checkpoint."""
        if self.folder is None:
            if resume:
                raise ValueError("resume=True needs a folder to resume from; give MetaTrainer(..., folder=...)")
            return
        if resume:
            self._restore(*checkpoint.load(self.folder / CHECKPOINT, self._about))
        elif not self._begun:
            found = [name for name in (CHECKPOINT, BEST, LOG, SUMMARY) if (self.folder / name).exists()]
            if found:
                raise FileExistsError(
                    f"{self.folder} holds {', '.join(found)} of an earlier training; fit(resume=True) carries on with "
                    "it, another folder starts anew"
                )
        _make_writable(self.folder)

    def _begin_log(self) -> None:
        """Write the log up to the checkpoint there is; rows that were written after it are written again."""
        if self.folder is not None:
            write_log(self.folder / LOG, self._progress.history)
            self._begun = True

    def _save(self) -> None:
        if self.folder is None:
            return
        tensors = {f"rule.{name}": tensor for name, tensor in self.rule.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        if self._judged is not self.rule:
            tensors |= {f"average.{name}": tensor for name, tensor in self._judged.state_dict().items()}
        for index, entry in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entry.items()}
        tensors["generator.now"] = self._generator.get_state()
        if self._run is not None:
            assert self._run.params is not None
            assert self._run.state is not None
            tensors["generator.run"] = self._run.generator_state
            tensors["run.state"] = self._run.state
            # Numbered, because the order of the names is that of the coordinates.
            for index, (name, tensor) in enumerate(self._run.params.items()):
                tensors[f"run.params.{index}.{name}"] = tensor
        checkpoint.save(self.folder / CHECKPOINT, tensors, self._about, self._progress)
        best = self.best_rule
        if isinstance(best, CoordinatewiseLSTM):
            best.save(self.folder / BEST)

    def _restore(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        self.rule.load_state_dict(checkpoint.select(tensors, "rule."))
        self._best = checkpoint.select(tensors, "best.")
        if self._judged is not self.rule:
            self._judged.load_state_dict(checkpoint.select(tensors, "average."))
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in checkpoint.select(tensors, "optimizer.").items():
            index, name = key.split(".")
            entries.setdefault(int(index), {})[name] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": entries})
        self._progress = progress
        self._run = None
        if "generator.run" in tensors:
            self._generator.set_state(tensors["generator.run"])
            self._run = self._start_run()
            params = checkpoint.select(tensors, "run.params.")
            self._run.params = {
                key.split(".", 1)[1]: params[key].to(self._device)
                for key in sorted(params, key=lambda key: int(key.split(".", 1)[0]))
            }
            self._run.state = tensors["run.state"].to(self._device)
        self._generator.set_state(tensors["generator.now"])

    def _write_summary(self, result: TrainResult) -> None:
        assert self.folder is not None
        summary: dict[str, Any] = {
            "best_validation_loss": _finite_or_none(result.best_validation_loss),
            "best_update": result.best_update,
            "updates": result.updates,
            "skipped": self._progress.skipped,
            "seconds": result.seconds,
            "stopped": result.stopped,
            **self._about,
        }
        (self.folder / SUMMARY).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _make_writable(folder: Path) -> None:
    """Make the folder and try it, so that training does not find out after its first validation."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"can't write to the folder {folder}: {error.strerror or error}; name another one") from error


def _copy_weights(rule: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in rule.state_dict().items()}


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None

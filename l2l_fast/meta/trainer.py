"""Meta-training: truncated backpropagation through runs of a rule on fresh problem instances."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from l2l_fast.meta import checkpoint
from l2l_fast.meta.checkpoint import Progress
from l2l_fast.meta.config import TrainConfig
from l2l_fast.meta.distributed import Team, job, restarted
from l2l_fast.meta.folder import TrainingFolder
from l2l_fast.meta.graph import StepGraph, check_graph
from l2l_fast.meta.imitation import Teacher, check_teaching
from l2l_fast.meta.interrupt import DeferredSignals
from l2l_fast.meta.log import LogRow, TrainEvent
from l2l_fast.meta.shard import Shard
from l2l_fast.meta.stuck import LITTLE_FALL, leads_nowhere, why_stuck
from l2l_fast.meta.validation import batch_size, validate, validation_functions
from l2l_fast.problems import Problem
from l2l_fast.rule import CoordinatewiseLSTM

logger = logging.getLogger("l2l_fast")

MAX_SKIPPED_IN_A_ROW = 100

_NORM_DECAY = 0.95  # of the running mean of gradient norms
_RETURN_WARMUP = 20  # updates over which the learning rate rises after a return to the best rule

StopReason = Literal["updates", "patience", "max_seconds"]


@dataclass(frozen=True)
class TrainResult:
    """What :meth:`MetaTrainer.fit` returns.

    Attributes:
        best_rule: the rule of the best validation.
        best_validation_loss: its loss there, see ``TrainConfig.validate_by``.
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


class MetaTrainer:
    """Trains ``rule`` on instances of ``problem``.

    Where the validation runs of the rule lead nowhere any more, training goes back to the best one there was, and
    carries on from it.

    Where ``torch.distributed`` is initialised, its ranks share the shards of an update and hold the same rule, that of
    the first one to begin with. All of them make the trainer and call :meth:`fit`. Only the first one validates and
    writes files. The result is the same for any number of ranks, on processors that compute the same.

    Args:
        rule: a :class:`CoordinatewiseLSTM`, or any module that :func:`unroll` takes; trained in place,
            while the best one is in the result.
        problem: where instances come from.
        config: settings; ``None`` is :class:`TrainConfig` as it is.
        teacher: train the rule to take this optimizer's steps, see :func:`imitate`, as a warm start; the rule drives a
            share of the runs that grows from none to all. Validation is by the loss of the problem nevertheless.
            ``None`` trains by backpropagation through the losses.
        folder: where to keep ``checkpoint.safetensors``, ``log.csv``, ``summary.json`` and, of a
            :class:`CoordinatewiseLSTM`, ``best.safetensors`` (a rule file); made if need be. ``None`` keeps nothing.
        starts_from: what the rule was trained as before, in a word such as the name of its file. The card tells it, and
            a checkpoint of a training that started from something else is not resumed. ``None`` names nothing.

    Attributes:
        warns: whether it is still to say, by the logger ``l2l_fast``, that nothing is learned and why.
        config: the settings, with numbers for ``batch_size`` and ``validation_functions``.

    Raises:
        TypeError: if an argument has the wrong kind, or one that ``config.cuda_graph`` can't serve.
        ValueError: if no weight of the rule requires grad, or settings have no meaning with a teacher or on this
            device, or the ranks can't share the shards evenly or differ in what they are to train.

    Source: Andrychowicz et al. 2016, sections 2 and 3.
    """

    def __init__(
        self,
        rule: nn.Module,
        problem: Problem,
        config: TrainConfig | None = None,
        *,
        teacher: Teacher | None = None,
        folder: str | os.PathLike[str] | None = None,
        starts_from: str | None = None,
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
        if teacher is not None:
            check_teaching(rule, self.config)
        self.folder = None if folder is None else Path(folder)
        self._weights = [weight for weight in rule.parameters() if weight.requires_grad]
        if not self._weights:
            raise ValueError("the rule has no weight that requires grad, so there is nothing to train")
        self._device = self._weights[0].device
        self._team = Team(self._device)
        shares = self._team.share(self.config.shards)
        # Taken now: a problem may change while it is sampled from.
        self._about = checkpoint.describe(rule, problem, self.config, teacher, starts_from)
        if self.config.cuda_graph:
            self._team.together(lambda: check_graph(rule, problem))
        if self.config.batch_size is None:
            chosen = self._team.together(lambda: batch_size(rule, problem, self._device))
            self.config = replace(self.config, batch_size=chosen)
        if self.config.validation_functions is None:
            chosen = self._team.together(lambda: validation_functions(rule, problem, self._device))
            self.config = replace(self.config, validation_functions=chosen)
        self._about["config"] = self.config.to_dict()
        self._team.check_same({**checkpoint.flatten(self._about), "folder given": folder is not None})
        self._team.broadcast(rule.state_dict().values())
        self._files = None if self.folder is None else TrainingFolder(self.folder)
        self._optimizer = self._make_optimizer()
        graph = StepGraph() if self.config.cuda_graph else None
        self._shards = [Shard(number, problem, self.config, self._device, teacher, graph) for number in shares]
        self._progress = Progress()
        # What is validated: the rule itself, or a copy with the average of its weights.
        self._judged = rule if self.config.average is None else copy.deepcopy(rule)
        self._best = _copy_weights(rule)
        self.warns = self._team.leads and teacher is None
        self._validated: Tensor | None = None  # losses of a validation that was not looked into yet
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
                **{name: self._about[name] for name in ("teacher", "starts_from") if name in self._about},
                "updates": self._progress.best_update,
                "validation_loss": _finite_or_none(self._progress.best_validation_loss),
            }
        return best

    def fit(self, *, resume: bool = False, on_update: Callable[[TrainEvent], None] | None = None) -> TrainResult:
        """Train until ``config.updates`` updates are done, or patience or time run out.

        Ctrl-C and SIGTERM take effect after the current update, once a checkpoint is written. Called
        again, it carries on where it stopped; in a process that ``torchrun`` has started anew, from the checkpoint.

        Args:
            resume: carry on from the checkpoint in the folder; the result is that of training which was
                never interrupted, to the bit.
            on_update: called after every update, on every rank.

        Raises:
            FileExistsError: if the folder holds files of an earlier training and ``resume`` is false.
            FileNotFoundError: if there is no checkpoint to resume from.
            BlockingIOError: if another training is at work in the folder.
            OSError: if the folder can't be written.
            ValueError: if the checkpoint is damaged or belongs to another training, or the problem is at fault: shapes,
                losses that do not depend on the parameters or are not finite at the starting points.
            FloatingPointError: if 100 updates in a row, or all, have a loss or meta-gradient that is not finite.
            RuntimeError: if another rank has failed.
        """
        with ExitStack() as held:
            self._open(resume, held)
            with DeferredSignals() as signals:
                stopped = self._train(signals, on_update)
            if 0 < self._progress.updates == self._progress.skipped:
                raise FloatingPointError(
                    f"none of {self._progress.updates} meta-updates could be made: each had a loss or meta-gradient "
                    "that is not finite; look at the problem, lower output_scale or shorten truncation"
                )
            result = self._result(stopped)
            if self._files is not None:
                self._team.from_leader(lambda: self._write_summary(result))
        return result

    def _train(self, signals: DeferredSignals, on_update: Callable[[TrainEvent], None] | None) -> StopReason:
        config, progress = self.config, self._progress
        begin, before = time.perf_counter(), progress.seconds
        if not progress.history:
            self._validate()
        self._save()
        self._begin_log()
        while (stopped := self._stopped(progress.seconds - before)) is None:
            lr, loss, grad_norm = self._update(before - begin)
            due = progress.updates % config.validate_every == 0 or progress.updates == config.updates
            validated = self._validate() if due else None
            if due and self._collapsed():
                self._go_back()
            if progress.updates % (config.checkpoint_every or config.validate_every) == 0:
                self._save()
            self._warn_if_stuck()
            event = self._event(lr, loss, grad_norm, validated)

            def report(event: TrainEvent = event) -> int:
                if on_update is not None:
                    on_update(event)
                return signals.received or 0

            # Agreed on, as a rank that goes on alone would wait for the others.
            if received := int(self._team.greatest(report)):
                self._save()
                signals.deliver(received)
        if progress.history[-1].update != progress.updates and stopped == "updates":
            self._validate()  # an earlier call ended in the middle of it
        self._save()
        return stopped

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

    def _update(self, clock: float) -> tuple[float, float, float]:
        """One segment of every shard and, if loss and gradient are finite, one step of Adam.

        Args:
            clock: what to add to the time for the seconds of training.

        Returns:
            Learning rate, loss and norm of the gradient.
        """
        config, progress = self.config, self._progress
        count = sum(weight.numel() for weight in self._weights)
        # Every shard's own, added up in one order: the bits of the mean do not depend on who computed which.
        rows = self._team.gather(lambda: self._segments(clock), len(self._shards), count + 3)
        mean = rows.mean(0)
        self._set_gradient(mean[:count])
        norm = get_total_norm([weight.grad for weight in self._weights if weight.grad is not None])
        lr, loss, grad_norm = self._lr(), mean[count].item(), norm.item()
        progress.seconds = rows[:, count + 2].max().item()
        progress.updates += 1
        progress.position += min(config.truncation, config.horizon - progress.position)
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
            self._skip(lost_at_the_start=bool(rows[:, count + 1].any()))
        if progress.position >= config.horizon:
            for shard in self._shards:
                shard.end_run()
            progress.position = 0
        return lr, loss, grad_norm

    def _segments(self, clock: float) -> Tensor:
        """A row for each shard of this rank: the meta-gradient, the loss, whether it was lost already at the starting
        point, the seconds of training."""
        rows, done = [], self._progress.updates / self.config.updates
        for shard in self._shards:
            segment = shard.unroll(self.rule, self._progress.position, done)
            grads = torch.autograd.grad(segment.loss, self._weights, materialize_grads=True)
            loss = segment.loss.detach().double()
            lost = not (self._progress.position or segment.losses[0].isfinite().all())
            rest = loss.new_tensor([lost, clock + time.perf_counter()])
            rows.append(torch.cat([*(grad.reshape(-1).double() for grad in grads), loss.view(1), rest]))
        return torch.stack(rows)

    def _set_gradient(self, flat: Tensor) -> None:
        blocks = torch.split(flat, [weight.numel() for weight in self._weights])
        for weight, block in zip(self._weights, blocks, strict=True):
            weight.grad = block.view(weight.shape).to(weight.dtype)

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
        for kept, buffer in zip(self._judged.buffers(), self.rule.buffers(), strict=True):
            kept.copy_(buffer)

    def _skip(self, *, lost_at_the_start: bool) -> None:
        """Count an update that could not be made, and leave the runs that have gone astray."""
        progress = self._progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        progress.position = self.config.horizon
        if progress.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return
        if lost_at_the_start:
            raise FloatingPointError(
                f"{MAX_SKIPPED_IN_A_ROW} meta-updates in a row had a loss that is not finite, the last one already at "
                "the starting points, before the rule had taken a step; look at init and loss of the problem"
            )
        raise FloatingPointError(
            f"{MAX_SKIPPED_IN_A_ROW} meta-updates in a row had a loss or meta-gradient that is not finite; lower "
            f"lr (now {self.config.lr:g}), set clip (now {self.config.clip}) or shorten truncation "
            f"(now {self.config.truncation})"
        )

    def _validate(self) -> float:
        """Validate the rule, or that of the averaged weights; a row of the history."""
        progress = self._progress
        value = self._team.from_leader(self._validation_loss)
        if not progress.history or value < progress.best_validation_loss:
            self._best = _copy_weights(self._judged)
            progress.best_update = progress.updates
        row = LogRow(
            update=progress.updates,
            seconds=progress.seconds,
            lr=self._lr(),
            loss=progress.loss_sum / progress.segments if progress.segments else None,
            grad_norm=progress.grad_norm_sum / progress.segments if progress.segments else None,
            skipped=progress.skipped,
            validation_loss=value,
            best_validation_loss=min(value, progress.best_validation_loss),
        )
        progress.history.append(row)
        progress.segments, progress.loss_sum, progress.grad_norm_sum = 0, 0.0, 0.0
        if self._begun:
            self._write_log()
        return value

    def _validation_loss(self) -> float:
        found = validate(self._judged, self.problem, self.config, self._device)
        self._validated = found.losses
        return found.loss

    def _collapsed(self) -> bool:
        """Whether the runs of the rule, as it was just validated, lead nowhere, and those of an earlier one did."""
        progress = self._progress
        nowhere = self._team.from_leader(lambda: None if self._validated is None else leads_nowhere(self._validated))
        loss, best = progress.history[-1].validation_loss, progress.best_validation_loss
        return bool(nowhere) and progress.best_update > 0 and loss - best > LITTLE_FALL * abs(best)

    def _go_back(self) -> None:
        """Carry on from the best rule with new runs: from one whose meta-gradients have vanished no way leads back."""
        progress = self._progress
        if self._team.leads:
            logger.warning(
                "after %d updates the runs of the rule lead nowhere any more; back to the rule of update %d",
                progress.updates,
                progress.best_update,
            )
        self.rule.load_state_dict(self._best)
        if self._judged is not self.rule:
            self._judged.load_state_dict(self._best)
        self._optimizer = self._make_optimizer()
        progress.returned, progress.running_norm, progress.position = progress.updates, 0.0, 0
        self._validated = None
        for shard in self._shards:
            shard.end_run()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self._weights, lr=self.config.lr, fused=True)

    def _lr(self) -> float:
        """Of the next update. The first steps of a fresh Adam are as long as any, so it rises again after a return."""
        progress = self._progress
        since = progress.updates - progress.returned if progress.returned else _RETURN_WARMUP
        return min(1.0, (since + 1) / (_RETURN_WARMUP + 1)) * self.config.lr_at(progress.updates)

    def _warn_if_stuck(self) -> None:
        """Say once, as early as it can be known, why nothing is learned."""
        if not self.warns or self._validated is None:
            return
        losses, self._validated = self._validated, None
        try:
            reason = why_stuck(self._progress.history, losses, self._judged, self.problem, self.config, self._device)
        except Exception:  # of a problem that does not take what was asked here; a hint must not end a training
            logger.debug("could not look into what the training does", exc_info=True)
            return
        if reason is not None:
            self.warns = False
            logger.warning("this training is stuck: %s", reason)

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

    def _open(self, resume: bool, held: ExitStack) -> None:
        """Look at the folder, keep others out until ``held`` ends, and restore what is to be resumed."""
        if self._files is None:
            if resume:
                raise ValueError("resume=True needs a folder to resume from; give MetaTrainer(..., folder=...)")
            return
        if self._team.from_leader(lambda: self._claim(resume, held)):
            path = self._files.checkpoint
            self._restore(*self._team.together(lambda: checkpoint.load(path, self._about)))

    def _claim(self, resume: bool, held: ExitStack) -> bool:
        """Whether there is something to restore. No file is written before the first checkpoint."""
        assert self._files is not None
        path = self._files.checkpoint
        # A folder that the job was refused at first is not its own after a restart either.
        resume = resume or (restarted() and path.exists() and checkpoint.written_by(path) == job())
        if resume and not self._files.checkpoint.exists():
            raise FileNotFoundError(f"there is no file {self._files.checkpoint} to resume from")
        held.enter_context(self._files.held())
        if not (resume or self._begun):
            self._files.check_unused()
        return resume

    def _begin_log(self) -> None:
        """Write the log up to the checkpoint there is; rows that were written after it are written again."""
        if self._files is not None:
            self._write_log()
            self._begun = True

    def _write_log(self) -> None:
        files = self._files
        assert files is not None
        self._team.from_leader(lambda: files.write_log(self._progress.history))

    def _save(self) -> None:
        if self._files is None:
            return
        mine = {name: tensor for shard in self._shards for name, tensor in shard.to_tensors().items()}
        shards = self._team.collect(mine)
        self._team.from_leader(lambda: self._write_checkpoint(shards))

    def _write_checkpoint(self, shards: list[dict[str, Tensor]]) -> None:
        assert self._files is not None
        tensors = {f"rule.{name}": tensor for name, tensor in self.rule.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        if self._judged is not self.rule:
            tensors |= {f"average.{name}": tensor for name, tensor in self._judged.state_dict().items()}
        for index, entry in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entry.items()}
        for shard in shards:
            tensors |= shard
        checkpoint.save(self._files.checkpoint, tensors, self._about, self._progress)
        best = self.best_rule
        if isinstance(best, CoordinatewiseLSTM):
            best.save(self._files.best)

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
        for shard in self._shards:
            shard.restore(tensors)

    def _write_summary(self, result: TrainResult) -> None:
        assert self._files is not None
        summary: dict[str, Any] = {
            "best_validation_loss": _finite_or_none(result.best_validation_loss),
            "best_update": result.best_update,
            "updates": result.updates,
            "skipped": self._progress.skipped,
            "seconds": result.seconds,
            "stopped": result.stopped,
            **self._about,
        }
        self._files.write_summary(summary)


def _copy_weights(rule: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in rule.state_dict().items()}


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None

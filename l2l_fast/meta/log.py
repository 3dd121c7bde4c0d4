"""What meta-training reports while it runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from l2l_fast.meta.distributed import Team


@dataclass(frozen=True)
class TrainEvent:
    """One meta-update, as handed to ``on_update``.

    Attributes:
        update: updates done, this one included.
        updates: updates in all.
        loss: meta-loss of the segment.
        grad_norm: global norm of the meta-gradient before clipping.
        lr: learning rate of the update.
        seconds: seconds of training so far.
        skipped: updates skipped so far because of a loss or meta-gradient that was not finite.
        validation_loss: mean loss on the validation instances, if this update was validated.
        best_validation_loss: the best so far.
    """

    update: int
    updates: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float
    skipped: int
    validation_loss: float | None
    best_validation_loss: float


@dataclass(frozen=True)
class LogRow:
    """One validation, as kept in the history and in ``log.csv``.

    Attributes:
        update: updates done.
        seconds: seconds of training so far.
        lr: learning rate of the next update.
        loss: mean meta-loss of the segments since the row before, skipped ones left out; ``None`` if there were none.
        grad_norm: mean norm of their meta-gradients before clipping.
        skipped: updates skipped so far.
        validation_loss: mean over the validation instances of the loss, by ``TrainConfig.validate_by``.
        best_validation_loss: the best so far.
    """

    update: int
    seconds: float
    lr: float
    loss: float | None
    grad_norm: float | None
    skipped: int
    validation_loss: float
    best_validation_loss: float


def tensorboard(folder: str | os.PathLike[str]) -> Callable[[TrainEvent], None]:
    """A consumer of events for ``fit(on_update=...)`` that writes TensorBoard scalars to ``folder``.

    A training that is resumed carries the curves in the folder on; points that came after its checkpoint are replaced.
    Of several ranks only the first one writes.

    Raises:
        ImportError: if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard is not installed: pip install 'l2l_fast[tensorboard]', or train without it"
        ) from error
    writer: SummaryWriter | None = None

    def write(event: TrainEvent) -> None:
        nonlocal writer
        if not Team(torch.device("cpu")).leads:
            return
        if writer is None:
            # Not before: only now it is known from where the curves go on.
            writer = SummaryWriter(os.fspath(folder), purge_step=event.update)
        for name in ("loss", "grad_norm", "lr", "skipped", "validation_loss"):
            value = getattr(event, name)
            if value is not None and math.isfinite(value):
                writer.add_scalar(f"meta/{name}", value, event.update)
        # Each time, so that a process that is killed leaves no gap.
        writer.flush()

    return write

"""Settings of meta-training, validated when they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from l2l_fast.backends import get

# Fields that may differ when training is resumed: they have no influence on its result.
FREE_FIELDS = frozenset({"checkpoint_every", "max_seconds"})

_GREATEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class TrainConfig:
    """How :class:`MetaTrainer` trains.

    A run of ``horizon`` steps on fresh instances is cut into segments of ``truncation`` steps; each
    segment gives one update of the rule by Adam.

    Args:
        updates: meta-updates in all. The learning rate decays over exactly these.
        horizon: steps of a run, and of validation.
        truncation: steps of a segment; ``horizon`` for untruncated training.
        batch_size: instances of a run.
        lr: learning rate of Adam at the first update.
        final_lr_fraction: learning rate at the last update as a fraction of ``lr``; exponential in between.
        clip: greatest global norm of the meta-gradient; a longer one is scaled down. ``None`` never does.
        second_derivatives: differentiate through the gradients of the instances as well.
        loss_weights: weight of the loss at each of the ``horizon + 1`` points of a run; ``None`` is 1 for each.
        validate_every: updates between validations.
        validation_functions: instances to validate on, always the same ones.
        validation_seed: seed that they are drawn from.
        patience: stop after so many validations in a row without a new best; ``None`` never does.
        checkpoint_every: updates between checkpoints; ``None`` writes one at each validation.
        seed: seed of the training instances and their minibatches.
        max_seconds: stop after so many seconds of a call of ``fit``; a safety stop, as the learning rate
            does not know of it.
        backend: name of a backend, or ``None`` for the fastest that works.

    Raises:
        ValueError, TypeError: if a setting has no meaning, saying which and why.
    """

    updates: int = 4000
    horizon: int = 100
    truncation: int = 20
    batch_size: int = 16
    lr: float = 1e-2
    final_lr_fraction: float = 0.03
    clip: float | None = 1.0
    second_derivatives: bool = False
    loss_weights: tuple[float, ...] | None = None
    validate_every: int = 100
    validation_functions: int = 1024
    validation_seed: int = 2**31
    patience: int | None = None
    checkpoint_every: int | None = None
    seed: int = 0
    max_seconds: float | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("updates", 0),
            ("horizon", 1),
            ("truncation", 1),
            ("batch_size", 1),
            ("validate_every", 1),
            ("validation_functions", 1),
            ("patience", 1),
            ("checkpoint_every", 1),
            ("seed", 0),
            ("validation_seed", 0),
        ):
            self._check_int(name, least)
        for name in ("seed", "validation_seed"):
            if getattr(self, name) > _GREATEST_SEED:
                raise ValueError(f"{name} must be at most 2**63 - 1, got {getattr(self, name)}")
        for name in ("lr", "final_lr_fraction", "clip", "max_seconds"):
            self._check_positive(name)
        if self.final_lr_fraction > 1:
            raise ValueError(f"final_lr_fraction must be at most 1, got {self.final_lr_fraction}")
        if self.truncation > self.horizon:
            raise ValueError(
                f"truncation must be at most the horizon of {self.horizon} steps, got {self.truncation}; "
                "the same number gives untruncated training"
            )
        if self.seed == self.validation_seed:
            raise ValueError(f"seed and validation_seed are both {self.seed}: validation would see training instances")
        if self.loss_weights is not None:
            object.__setattr__(self, "loss_weights", tuple(map(float, self.loss_weights)))
            self._check_loss_weights()
        if self.backend is not None:
            if not isinstance(self.backend, str):
                raise TypeError(f"backend must be the name of a backend or None, got {self.backend!r}")
            get(self.backend)  # raises if there is none of that name

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None and name in ("patience", "checkpoint_every"):
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name in ("clip", "max_seconds"):
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and positive, got {value!r}")

    def _check_loss_weights(self) -> None:
        assert self.loss_weights is not None
        if len(self.loss_weights) != self.horizon + 1:
            raise ValueError(
                f"loss_weights must have one entry for each of the {self.horizon + 1} points of {self.horizon} steps, "
                f"the start and the end included, got {len(self.loss_weights)}"
            )
        if not all(math.isfinite(weight) for weight in self.loss_weights):
            raise ValueError("loss_weights must be finite")

    def lr_at(self, update: int) -> float:
        """Learning rate of the update after ``update`` others."""
        return self.lr * math.pow(self.final_lr_fraction, update / max(1, self.updates - 1))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-compatible values."""
        values = asdict(self)
        if self.loss_weights is not None:
            values["loss_weights"] = list(self.loss_weights)
        return values

"""Settings of meta-training, validated when they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from l2l_fast.backends import get
from l2l_fast.meta.objective import Objective

ValidateBy = Literal["end", "run"]

# Fields that may differ when training is resumed: they have no influence on its result.
FREE_FIELDS = frozenset({"checkpoint_every", "cuda_graph", "max_seconds"})

_GREATEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class TrainConfig:
    """How :class:`MetaTrainer` trains.

    A run of ``horizon`` steps on fresh instances is cut into segments of ``truncation`` steps; each
    segment gives one update of the rule by Adam. Processes that train together share the shards among them.

    Args:
        updates: meta-updates in all, over which the learning rate goes its way.
        horizon: steps of a run, and of validation.
        truncation: steps of a segment; ``horizon`` for untruncated training.
        batch_size: instances of a run; ``None`` is 16, or as many as have 4096 coordinates in all, but at least 1.
        shards: independent runs of ``batch_size`` instances each, with random numbers of their own, that one update
            averages over.
        mirrored: share of the updates, at the beginning, during which runs may be mirrored: half of their coordinates,
            drawn at random, point the other way. All of the first runs are, and ever fewer. It keeps a fresh rule from
            saturating networks; has no effect with a teacher.
        lr: learning rate of Adam.
        hold: share of the updates for which it stays; after those it falls exponentially.
        final_lr_fraction: learning rate at the last update as a fraction of ``lr``.
        warmup: updates over which the learning rate rises linearly to what it would be without them.
        clip: greatest global norm of the meta-gradient; a longer one is scaled down. ``None`` never does.
        clip_ratio: greatest norm of the meta-gradient, relative to the running mean of the norms so far; ``None``
            for any.
        average: decay of the exponential average of the rule's weights that is validated and kept as the best rule;
            ``None`` takes the weights themselves.
        objective: ``"loss"``, or ``"log"`` to train on ``log f``, for problems with positive losses.
        second_derivatives: differentiate through the gradients of the instances as well.
        slope_floor: bound on the slope of the preprocessing in second derivatives, see :func:`unroll`.
        coordinate_fraction: share of the coordinates that enter a meta-gradient, see :func:`unroll`.
        loss_weights: weight of the loss at each of the ``horizon + 1`` points of a run; ``None`` is 1 for each.
        loss_power: in place of ``loss_weights``, weights ``(power + 1) (t / horizon) ** power``: with 0 every point
            counts alike, the higher the more the end of the run does.
        validate_every: updates between validations.
        validation_functions: instances to validate on, always the same ones; ``None`` is 1024, or as many as have
            262 144 coordinates in all, but at least 4.
        validation_seed: seed that they are drawn from.
        validate_by: what a rule is worth there: ``"end"`` is the mean loss after the last step, ``"run"`` that over all
            points of the run.
        patience: stop after so many validations in a row without a new best; ``None`` never does.
        checkpoint_every: updates between checkpoints; ``None`` writes one at each validation.
        seed: seed of the training instances and their minibatches.
        max_seconds: stop after so many seconds of a call of ``fit``; a safety stop, as the learning rate
            does not know of it.
        backend: name of a backend, or ``None`` for the fastest that works.
        cuda_graph: replay the steps of a run as a CUDA graph, meant for small networks, of which a step is mostly
            launches. For first-order meta-gradients of a :class:`CoordinatewiseLSTM` on a CUDA device, without a
            teacher, and problems whose instances are :class:`l2l_fast.problems.Replayable`. The result is the same.
            Validation goes without.

    Raises:
        ValueError, TypeError: if a setting has no meaning, saying which and why.
    """

    updates: int = 4000
    horizon: int = 100
    truncation: int = 20
    batch_size: int | None = None
    shards: int = 1
    mirrored: float = 0.1
    lr: float = 1e-2
    hold: float = 0.6
    final_lr_fraction: float = 0.03
    warmup: int = 0
    clip: float | None = None
    clip_ratio: float | None = 2.0
    average: float | None = 0.98
    objective: Objective = "loss"
    second_derivatives: bool = False
    slope_floor: float = 0.0
    coordinate_fraction: float = 1.0
    loss_weights: tuple[float, ...] | None = None
    loss_power: float = 0.0
    validate_every: int = 100
    validation_functions: int | None = None
    validation_seed: int = 2**31
    validate_by: ValidateBy = "end"
    patience: int | None = None
    checkpoint_every: int | None = None
    seed: int = 0
    max_seconds: float | None = None
    backend: str | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("updates", 0),
            ("horizon", 1),
            ("truncation", 1),
            ("batch_size", 1),
            ("shards", 1),
            ("warmup", 0),
            ("validate_every", 1),
            ("validation_functions", 1),
            ("patience", 1),
            ("checkpoint_every", 1),
            ("seed", 0),
            ("validation_seed", 0),
        ):
            self._check_int(name, least)
        for name in ("second_derivatives", "cuda_graph"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("seed", "validation_seed"):
            if getattr(self, name) > _GREATEST_SEED:
                raise ValueError(f"{name} must be at most 2**63 - 1, got {getattr(self, name)}")
        for name in ("lr", "final_lr_fraction", "clip", "clip_ratio", "average", "coordinate_fraction", "max_seconds"):
            self._check_positive(name)
        for name in ("final_lr_fraction", "coordinate_fraction"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)}")
        for name in ("mirrored", "hold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a share of the updates, from 0 to 1, got {value}")
        if self.average is not None and self.average >= 1:
            raise ValueError(
                f"average must be below 1, got {self.average}; without it, the weights themselves are kept"
            )
        if self.objective not in get_args(Objective):
            known = ", ".join(map(repr, get_args(Objective)))
            raise ValueError(f"unknown objective {self.objective!r}; known objectives: {known}")
        if self.validate_by not in get_args(ValidateBy):
            known = ", ".join(map(repr, get_args(ValidateBy)))
            raise ValueError(f"validate_by must be one of {known}, got {self.validate_by!r}")
        if not (math.isfinite(self.slope_floor) and self.slope_floor >= 0):
            raise ValueError(f"slope_floor must be finite and not negative, got {self.slope_floor}")
        if self.slope_floor and not self.second_derivatives:
            raise ValueError("slope_floor has a meaning with second derivatives only; set it to 0")
        if self.cuda_graph and self.second_derivatives:
            raise ValueError("a CUDA graph takes the steps of first-order meta-gradients only; leave cuda_graph out")
        if self.coordinate_fraction < 1 and self.second_derivatives:
            raise ValueError("second derivatives need every coordinate; set coordinate_fraction to 1")
        if not (math.isfinite(self.loss_power) and self.loss_power >= 0):
            raise ValueError(f"loss_power must be finite and not negative, got {self.loss_power}")
        if self.truncation > self.horizon:
            raise ValueError(
                f"truncation must be at most the horizon of {self.horizon} steps, got {self.truncation}; "
                "the same number gives untruncated training"
            )
        if self.seed == self.validation_seed:
            raise ValueError(f"seed and validation_seed are both {self.seed}: validation would see training instances")
        if self.loss_weights is not None:
            if self.loss_power:
                raise ValueError("loss_weights and loss_power are two ways to say the same; give one of them")
            object.__setattr__(self, "loss_weights", tuple(map(float, self.loss_weights)))
            self._check_loss_weights()
        if self.backend is not None:
            if not isinstance(self.backend, str):
                raise TypeError(f"backend must be the name of a backend or None, got {self.backend!r}")
            get(self.backend)  # raises if there is none of that name

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None and name in ("batch_size", "validation_functions", "patience", "checkpoint_every"):
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name in ("clip", "clip_ratio", "average", "max_seconds"):
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
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.loss_weights):
            raise ValueError("loss_weights must be finite and not negative")
        if not any(self.loss_weights):
            raise ValueError("loss_weights are all 0, which trains nothing; give the points that count a positive one")

    def lr_at(self, update: int) -> float:
        """Learning rate of the update after ``update`` others."""
        warm = min(1.0, (update + 1) / (self.warmup + 1))
        held = self.hold * (self.updates - 1)
        fallen = max(0.0, update - held) / ((self.updates - 1 - held) or 1.0)
        return warm * self.lr * math.pow(self.final_lr_fraction, fallen)

    def weights_between(self, first: int, last: int) -> list[float]:
        """Weights of the points ``first`` to ``last`` of a run, both included."""
        if self.loss_weights is not None:
            return list(self.loss_weights[first : last + 1])
        return [(self.loss_power + 1) * math.pow(t / self.horizon, self.loss_power) for t in range(first, last + 1)]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-compatible values."""
        values = asdict(self)
        if self.loss_weights is not None:
            values["loss_weights"] = list(self.loss_weights)
        return values

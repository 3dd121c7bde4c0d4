"""What a rule is, as values: the preprocessing, the size of the network and the layout of its weights.

Letters used throughout the library: ``N`` coordinates, ``H`` hidden units per layer, ``F`` input
features, ``T`` steps of an unroll, ``P`` weights of a rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")


@dataclass(frozen=True)
class LogAndSign:
    """Gradient preprocessing that keeps magnitude and sign apart.

    ``|g| >= exp(-p)`` gives the features ``(log|g| / p, sign g)``, smaller gradients ``(-1, exp(p) g)``.

    Args:
        p: how many e-folds of gradient magnitude the first feature maps onto ``[-1, 0]``.

    Raises:
        TypeError: if ``p`` is not a number.
        ValueError: if it is not in ``[0.001, 80]``; ``exp(80)`` is near float32's limit.

    Source: Andrychowicz et al. 2016, appendix A.
    """

    p: float = 10.0
    features: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_number("LogAndSign.p", self.p)
        if not (math.isfinite(self.p) and 1e-3 <= self.p <= 80):
            raise ValueError(f"LogAndSign.p must be a finite number in [0.001, 80], got {self.p!r}; the paper uses 10")


@dataclass(frozen=True)
class Identity:
    """No preprocessing: the gradient itself is the only feature."""

    features: ClassVar[int] = 1


Preprocess = LogAndSign | Identity


@dataclass(frozen=True)
class RuleSpec:
    """Everything about a two-layer coordinatewise LSTM but its weights.

    Args:
        hidden_size: units per layer, ``H``.
        preprocess: what turns a gradient into features; ``None`` is the identity.
        output_scale: factor on the network's output.

    Raises:
        ValueError, TypeError: if a field has no meaning.
    """

    hidden_size: int = 20
    preprocess: Preprocess = field(default_factory=LogAndSign)
    output_scale: float = 0.1

    def __post_init__(self) -> None:
        if self.preprocess is None:
            object.__setattr__(self, "preprocess", Identity())
        if not isinstance(self.preprocess, LogAndSign | Identity):
            raise TypeError(
                "preprocess must be l2l_fast.LogAndSign(p=...), l2l_fast.Identity() or None, "
                f"got {type(self.preprocess).__name__}"
            )
        if isinstance(self.hidden_size, bool) or not isinstance(self.hidden_size, int):
            raise TypeError(f"hidden_size must be an int, got {type(self.hidden_size).__name__}")
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {self.hidden_size}")
        _check_number("output_scale", self.output_scale)
        if not math.isfinite(self.output_scale):
            raise ValueError(f"output_scale must be finite, got {self.output_scale!r}")

    @property
    def features(self) -> int:
        """Number of features ``F`` that one gradient becomes."""
        return self.preprocess.features

    @property
    def log_p(self) -> float:
        """``p`` of :class:`LogAndSign`, or 0 for the identity: the form in which backends take it."""
        return self.preprocess.p if isinstance(self.preprocess, LogAndSign) else 0.0

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Blocks of the flat weight vector in order; gates in the order i, f, g, o as in ``torch.nn.LSTMCell``."""
        h, f = self.hidden_size, self.features
        return {
            "weight_ih_1": (4 * h, f),
            "weight_hh_1": (4 * h, h),
            "bias_1": (4 * h,),
            "weight_ih_2": (4 * h, h),
            "weight_hh_2": (4 * h, h),
            "bias_2": (4 * h,),
            "weight_out": (h,),
            "bias_out": (1,),
        }

    @property
    def num_weights(self) -> int:
        """Length ``P`` of the flat weight vector."""
        return sum(math.prod(shape) for shape in self.weight_shapes.values())

    def to_dict(self) -> dict[str, Any]:
        """The specification as JSON-compatible values."""
        name = "log_and_sign" if isinstance(self.preprocess, LogAndSign) else "identity"
        preprocess: dict[str, Any] = {"name": name}
        if isinstance(self.preprocess, LogAndSign):
            preprocess["p"] = self.preprocess.p
        return {"hidden_size": self.hidden_size, "preprocess": preprocess, "output_scale": self.output_scale}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RuleSpec:
        """The specification that :meth:`to_dict` wrote.

        Raises:
            ValueError: if a key is missing or a value has no meaning.
        """
        try:
            preprocess = values["preprocess"]
            name = preprocess["name"]
            if name not in ("log_and_sign", "identity"):
                raise ValueError(f"unknown preprocessing {name!r}; known: 'log_and_sign', 'identity'")
            return cls(
                hidden_size=values["hidden_size"],
                preprocess=LogAndSign(float(preprocess["p"])) if name == "log_and_sign" else Identity(),
                output_scale=float(values["output_scale"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a rule specification: {values!r} ({error!r})") from error

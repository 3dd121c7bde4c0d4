"""Weights of the code published with the paper, in the layout of a rule.

That code, google-deepmind/learning-to-learn, is built on Sonnet 1. Its LSTM computes what ``torch.nn.LSTMCell`` does,
with the gates in the order i, g, f, o, one matrix for inputs and hidden state, and a forget bias of 1 that is added at
run time. State starts at zero there too, and is not learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2l_fast.spec import LogAndSign, Preprocess, RuleSpec

# What the published code takes for networks.
PUBLISHED = RuleSpec(preprocess=LogAndSign(5.0), output_scale=0.01)

FORGET_BIAS = 1.0

_NAMES = ("lstm_1/w_gates", "lstm_1/b_gates", "lstm_2/w_gates", "lstm_2/b_gates", "linear/w", "linear/b")


def from_sonnet(
    weights: Mapping[str, Any], preprocess: Preprocess | None, output_scale: float
) -> tuple[RuleSpec, dict[str, Tensor]]:
    """Specification and parameters of the rule that ``weights`` make; see ``CoordinatewiseLSTM.from_sonnet``.

    Returns:
        The :class:`RuleSpec` and new CPU tensors by name of parameter, all float64 if all weights are, else float32.
    """
    found = _collect(weights)
    spec = RuleSpec(_hidden_size(found), preprocess, output_scale)  # type: ignore[arg-type]  # None is the identity
    _check_shapes(found, spec)
    dtype = torch.float64 if all(tensor.dtype == torch.float64 for tensor in found.values()) else torch.float32
    found = {name: tensor.to(dtype, copy=True) for name, tensor in found.items()}
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite in {dtype}: import weights from before the training diverged")

    parameters = {"output.weight": found["linear/w"].reshape(1, -1), "output.bias": found["linear/b"]}
    for layer, inputs in enumerate((spec.features, spec.hidden_size)):
        w_gates, b_gates = found[f"lstm_{layer + 1}/w_gates"], found[f"lstm_{layer + 1}/b_gates"]
        forget_bias = torch.zeros_like(b_gates)
        forget_bias[spec.hidden_size : 2 * spec.hidden_size] = FORGET_BIAS
        parameters |= {
            f"cells.{layer}.weight_ih": _reorder(w_gates[:inputs].t()),
            f"cells.{layer}.weight_hh": _reorder(w_gates[inputs:].t()),
            f"cells.{layer}.bias_ih": _reorder(b_gates),
            f"cells.{layer}.bias_hh": forget_bias,
        }
    return spec, parameters


def _reorder(gates: Tensor) -> Tensor:
    """Rows ``[4H, ...]`` of the gates i, g, f, o in the order i, f, g, o; a copy."""
    i, g, f, o = gates.chunk(4)
    return torch.cat([i, f, g, o])


def _collect(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The six weights by module and variable, whatever scopes and nesting they come in."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a mapping of names to arrays, got {type(weights).__name__}")
    found: dict[str, Tensor] = {}
    for path, value in _leaves(weights):
        name = "/".join(path.removesuffix(":0").split("/")[-2:])
        if name in found:
            raise ValueError(f"{name} comes twice, the second time as {path}; pass the weights of one network")
        found[name] = _tensor(path, value)
    missing = [name for name in _NAMES if name not in found]
    unexpected = [name for name in found if name not in _NAMES]
    if missing or unexpected:
        raise ValueError(
            f"weights must be {', '.join(_NAMES)}: two LSTM layers and a linear output; "
            f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}"
        )
    return found


def _leaves(weights: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in weights.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _tensor(name: str, value: object) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.name in ("float16", "float32", "float64"):
        # PyTorch takes neither foreign byte order nor negative strides, and warns of memory it must not write.
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = f"{type(value).__name__} of {value.dtype}" if hasattr(value, "dtype") else type(value).__name__
        raise TypeError(f"{name} must be a floating-point NumPy array or tensor, got {kind}")
    return value.detach().cpu()


def _hidden_size(found: Mapping[str, Tensor]) -> int:
    sizes = []
    for name in ("lstm_1/b_gates", "lstm_2/b_gates"):
        shape = tuple(found[name].shape)
        if len(shape) != 1 or shape[0] % 4 or not shape[0]:
            raise ValueError(f"{name} must have shape (4 * units,), got {shape}")
        sizes.append(shape[0] // 4)
    if sizes[0] != sizes[1]:
        raise ValueError(f"lstm_1 has {sizes[0]} units and lstm_2 has {sizes[1]}; a rule has the same number in both")
    return sizes[0]


def _check_shapes(found: Mapping[str, Tensor], spec: RuleSpec) -> None:
    h, f = spec.hidden_size, spec.features
    if found["lstm_1/w_gates"].shape == (3 - f + h, 4 * h):  # the other preprocessing's number of features
        remedy = "None" if f == 2 else "LogAndSign(...)"
        raise ValueError(
            f"lstm_1/w_gates takes {3 - f} feature(s) per gradient but preprocess={spec.preprocess} makes {f}; "
            f"pass preprocess={remedy}"
        )
    expected = {
        "lstm_1/w_gates": (f + h, 4 * h),
        "lstm_2/w_gates": (h + h, 4 * h),
        "linear/w": (h, 1),
        "linear/b": (1,),
    }
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} beside lstm_1/b_gates of {h} units, got {tuple(found[name].shape)}"
            )

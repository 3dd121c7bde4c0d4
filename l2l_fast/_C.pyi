"""Types of the C++ core, whose functions are documented in ``csrc/bindings.cpp`` and ``csrc/core.h``."""

from numpy import float32
from numpy.typing import NDArray

HIDDEN_SIZE: int
TILE: int
FLOAT32: int
FLOAT16: int
BFLOAT16: int
INT8: int

class Weights:
    def __init__(self, flat: NDArray[float32], log_p: float, output_scale: float) -> None: ...

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def fma_peak(iterations: int) -> float: ...
def step_in_place(
    weights: Weights,
    params: list[int],
    grads: list[int],
    states: list[int],
    sizes: list[int],
    dtype: int,
    state_dtype: int,
    lr: float,
    weight_decay: float,
    maximize: bool,
    skip_nonfinite: bool,
    threads: int,
) -> None: ...
def step(
    weights: Weights,
    grad: NDArray[float32],
    state: NDArray[float32],
    update: NDArray[float32],
    new_state: NDArray[float32],
    threads: int,
) -> None: ...
def backward(
    weights: Weights,
    grads: NDArray[float32],
    terms: NDArray[float32],
    loss_weights: NDArray[float32],
    state: NDArray[float32] | None,
    d_last_state: NDArray[float32] | None,
    d_weights: NDArray[float32],
    d_grads: NDArray[float32] | None,
    d_state: NDArray[float32] | None,
    threads: int,
) -> None: ...

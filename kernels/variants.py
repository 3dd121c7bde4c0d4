"""The kernels that the library launches, as things to compile without a device."""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .backward import backward_kernel
from .launch import LaunchConfig, backward_config, step_config, step_in_place_config
from .scaled import SCALED_PLANE, TILE
from .step import step_in_place_kernel, step_kernel

_STATE = 80  # numbers per coordinate

_CONFIGS = {
    step_in_place_kernel: step_in_place_config,
    step_kernel: step_config,
    backward_kernel: backward_config,
}


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time constants.

    Args:
        name: what it does, and on what.
        kernel: the function under ``triton.jit``.
        signature: types of the run-time arguments, ``"*fp32"`` for a pointer.
        constants: the compile-time arguments, but for those that its configuration gives.
        bytes_per_coordinate: what has to move through device memory per coordinate, and step if it takes many.
        per_step: whether its work is counted per coordinate and step.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    bytes_per_coordinate: int
    per_step: bool = False

    @property
    def aligned(self) -> tuple[str, ...]:
        """Pointers to memory of the library's own, which is aligned to 16 bytes."""
        return tuple(name for name, kind in self.signature.items() if kind.startswith("*"))

    def config(self, capability: int) -> LaunchConfig:
        """How it is launched on ``capability``."""
        return _CONFIGS[self.kernel](capability)


def _signature(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> dict[str, str]:
    return {name: types.get(name, "fp32") for name in kernel.arg_names if name not in constants}


def _in_place(param: str, state: str, *, log: bool = True, skip_nonfinite: bool = False) -> Variant:
    dtypes = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16, "int8": tl.int8}
    constants = {"PARAM": dtypes[param], "STATE": dtypes[state], "LOG": log, "SKIP_NONFINITE": skip_nonfinite}
    types = {"table": "*i64", "tiles": "*i32", "n_tiles": "i32", "halves": "*fp16", "vectors": "*fp32"}
    words = [f"step, {state} state"]
    words += [f"{param} parameters"] * (param != "float32") + ["identity"] * (not log) + ["skip"] * skip_nonfinite
    stored = {"float32": 4 * _STATE, "float16": 2 * _STATE, "bfloat16": 2 * _STATE, "int8": 5 * SCALED_PLANE // TILE}
    return Variant(
        ", ".join(words),
        step_in_place_kernel,
        _signature(step_in_place_kernel, constants | {"PREFETCH": True}, types),
        constants,
        2 * stored[state] + 3 * stored[param] // _STATE,
    )


def _out_of_place(*, log: bool = True) -> Variant:
    constants = {"LOG": log}
    types = dict.fromkeys(("grads", "states", "updates", "new_states", "vectors"), "*fp32")
    types |= {"n": "i32", "halves": "*fp16"}
    return Variant(
        "differentiable step" + ", identity" * (not log),
        step_kernel,
        _signature(step_kernel, constants, types),
        constants,
        2 * _STATE * 4 + 2 * 4,
    )


def _backward(name: str, *, log: bool = True, one_step: bool = False) -> Variant:
    constants = {
        "LOG": log,
        "HAS_STATE": one_step,
        "HAS_D_NEW_STATE": one_step,
        "STORE_D_STATE": one_step,
        "STORE_D_GRAD": one_step,
    }
    pointers = ("grads", "d_points", "point_weights", "states", "d_new_states", "d_grads", "d_states", "scratch")
    types = dict.fromkeys((*pointers, "vectors"), "*fp32")
    types |= {"sums": "*fp64", "n": "i32", "steps": "i32", "halves": "*fp16"}
    # Of an unroll, the states at its ends are shared by all steps, and the scratch stays in the cache if it can.
    moved = 3 * _STATE * 4 + 3 * 4 if one_step else 2 * 4
    return Variant(name, backward_kernel, _signature(backward_kernel, constants, types), constants, moved, True)


def variants() -> list[Variant]:
    """Every kernel in the variants that matter."""
    return [
        _in_place("float32", "float32"),
        _in_place("float32", "float16"),
        _in_place("float32", "bfloat16"),
        _in_place("float32", "int8"),
        _in_place("float32", "float32", log=False),
        _in_place("float32", "float32", skip_nonfinite=True),
        _in_place("float32", "float16", skip_nonfinite=True),
        _in_place("float32", "int8", skip_nonfinite=True),
        _out_of_place(),
        _out_of_place(log=False),
        _backward("unroll backward"),
        _backward("unroll backward, identity", log=False),
        _backward("one step backward", one_step=True),
    ]


def compile_variant(variant: Variant, capability: int) -> CompiledKernel:
    """Machine code of ``variant`` for an NVIDIA device of ``capability`` (90 is 9.0), made without one."""
    config = variant.config(capability)
    names = variant.kernel.arg_names
    constants = variant.constants | ({"PREFETCH": config.prefetch} if "PREFETCH" in names else {})
    signature = variant.signature | dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(
        fn=variant.kernel,
        signature={name: signature[name] for name in names},
        constexprs=constants,
        attrs=aligned,
    )
    options = {key: value for key, value in config.options().items() if value is not None}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

"""Static analysis of the Triton kernels: they are compiled to machine code, and what that occupies is counted.

No GPU takes part: the times are predictions of :mod:`l2l_fast.experiments.cost_model`, and nothing is measured.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from l2l_fast.experiments import sass
from l2l_fast.experiments.cost_model import ARCHITECTURES, H200, Prediction, Work, predict, resident_warps, work_of
from l2l_fast.experiments.progress import progress

if TYPE_CHECKING:
    from l2l_fast.kernels.variants import Variant


@dataclass(frozen=True)
class NanHandling:
    """Floating-point instructions in the PTX of a kernel that return NaN if given one, and such that do not.

    Triton's interpreter takes minima as NumPy does, so only the PTX tells what the device will do.

    Attributes:
        propagating_minima: return NaN if given one.
        swallowing_minima: return the other operand.
        propagating_maxima: return NaN if given one.
        swallowing_maxima: return the other operand.
        saturations: to [0, 1], which make NaN 0.
    """

    propagating_minima: int
    swallowing_minima: int
    propagating_maxima: int
    swallowing_maxima: int
    saturations: int


@dataclass(frozen=True)
class Analysis:
    """A kernel compiled for one architecture.

    Attributes:
        name: of the variant.
        capability: compute capability, 90 for 9.0.
        per_step: whether costs are per coordinate and step, not per coordinate: the kernel takes many steps.
        registers: of a thread.
        spill_bytes: of a thread, in local memory.
        local_accesses: instructions in the whole kernel that access local memory.
        shared_memory: bytes of a program.
        resident_warps: of an SM.
        global_stores: instructions in the whole kernel; a kernel without them does nothing.
        nan_handling: of floating-point minima and maxima.
        loops: the innermost loops that ``work`` sums up.
        barriers: of a program in one iteration of each of them.
        floor_bytes: of device memory that have to move per coordinate (in the backward: and step).
        work: per coordinate (in the backward: and step).
        prediction: for the device of that architecture, if there is one to predict for.
    """

    name: str
    capability: int
    per_step: bool
    registers: int
    spill_bytes: int
    local_accesses: int
    shared_memory: int
    resident_warps: int
    global_stores: int
    nan_handling: NanHandling
    loops: int
    barriers: int
    floor_bytes: int
    work: Work
    prediction: Prediction | None


def bodies(program: sass.Program) -> list[sass.Loop]:
    """The loops that do a kernel's work once per tile, or once per tile and step.

    That is the loop over tiles, unless loops inside it use the tensor cores: then it is those, and all others inside.

    Raises:
        ValueError: if there is no loop.
    """
    if not program.loops:
        raise ValueError("the kernel has no loop")
    over_tiles = max(program.loops, key=lambda loop: len(loop.addresses))
    inside = program.innermost(over_tiles)
    computes = any(entry.multiply_adds for loop in inside for entry in program.inside(loop))
    return inside if computes else [over_tiles]


_MIN_MAX = re.compile(r"\b(min|max)((?:\.\w+)*)\.(?:f16|f16x2|bf16|bf16x2|f32|f64)\b")
_SATURATING = re.compile(r"\b[a-z]\w*(?:\.\w+)*\.sat(?:\.\w+)*\.(?:f16|f16x2|bf16|bf16x2|f32|f64)\b")


def nan_handling(ptx: str) -> NanHandling:
    """Count the instructions that may turn NaN into a number."""
    found = [(name, ".NaN" in modifiers) for name, modifiers in _MIN_MAX.findall(ptx)]
    return NanHandling(
        propagating_minima=found.count(("min", True)),
        swallowing_minima=found.count(("min", False)),
        propagating_maxima=found.count(("max", True)),
        swallowing_maxima=found.count(("max", False)),
        saturations=len(_SATURATING.findall(ptx)),
    )


def _cuobjdump() -> str:
    """Path of NVIDIA's disassembler, which comes with Triton.

    Raises:
        RuntimeError: if there is none.
    """
    from triton import knobs

    try:
        return str(knobs.nvidia.cuobjdump.path)
    except RuntimeError as error:
        raise RuntimeError(
            f"the kernels can't be disassembled: {error}; "
            "install a Triton that ships cuobjdump, or let TRITON_CUOBJDUMP_PATH name one"
        ) from error


def disassemble(cubin: bytes) -> str:
    """Resources and machine code of a kernel as text.

    Raises:
        RuntimeError: if the disassembler is missing or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [_cuobjdump(), "--dump-resource-usage", "--dump-sass", str(file)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"cuobjdump failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def _resource(listing: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", listing)
    if found is None:
        raise ValueError(f"the disassembly does not tell {name}")
    return int(found[1])


def analyse(variant: Variant, capability: int) -> Analysis:
    """Compile a variant of a kernel and count what its machine code does."""
    from l2l_fast.kernels.tile import TILE
    from l2l_fast.kernels.variants import compile_variant

    compiled = compile_variant(variant, capability)
    listing = disassemble(compiled.asm["cubin"])
    program = sass.Program(sass.parse(listing))
    counted = [sass.count(program.inside(loop)) for loop in bodies(program)]
    whole = sass.count(program.instructions)

    architecture, config = ARCHITECTURES[capability], variant.config(capability)
    registers, shared_memory = _resource(listing, "REG"), int(compiled.metadata.shared)
    warps = resident_warps(architecture, registers, shared_memory, config.num_warps)
    launched = min(warps, config.programs_per_sm * config.num_warps)
    work = partial(work_of, architecture=architecture, num_warps=config.num_warps, warps=launched, tile=TILE)
    works = [work(counts) for counts in counted]
    return Analysis(
        name=variant.name,
        capability=capability,
        per_step=variant.per_step,
        registers=registers,
        spill_bytes=_resource(listing, "STACK"),
        local_accesses=whole.local_accesses,
        shared_memory=shared_memory,
        resident_warps=warps,
        global_stores=whole.global_stores,
        nan_handling=nan_handling(compiled.asm["ptx"]),
        loops=len(counted),
        barriers=sum(counts.barriers for counts in counted),
        floor_bytes=variant.bytes_per_coordinate,
        work=sum(works[1:], works[0]),
        prediction=predict(works, variant.bytes_per_coordinate, H200) if capability == H200.capability else None,
    )


def analyse_all(capabilities: Sequence[int]) -> list[Analysis]:
    """Every variant of the kernels on every architecture, one architecture after the other.

    Raises:
        RuntimeError: if Triton is missing, only interprets, or comes without a disassembler.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("the kernels can't be compiled: triton is missing; run: pip install 'l2l_fast[triton]'")
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("the kernels can't be compiled while TRITON_INTERPRET is set; unset it")
    _cuobjdump()
    from l2l_fast.kernels.variants import variants

    chosen = [(variant, capability) for capability in capabilities for variant in variants()]
    # The compilers run outside of Python's lock, so threads are enough to keep all cores busy.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with progress("compiling kernels", len(chosen)) as advance:
            futures = [pool.submit(analyse, variant, capability) for variant, capability in chosen]
            for future in as_completed(futures):
                future.result()
                advance()
    finally:
        pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]

"""What machine code costs: how many warps an SM holds, what a loop occupies, and the time a simple model predicts.

Nothing here is a measurement. The model: every unit of an SM runs at a share of its peak, all of them at once, so the
slowest tells the time; and the warps that fit must be enough to fill the time that each of them waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from l2l_fast.experiments.sass import LANES, Counts

WARPS_OF_A_WARPGROUP = 4
REGISTERS_OF_AN_SM = 65536  # the same on every architecture below, as the next five
SCHEDULERS_OF_AN_SM = 4  # each issues an instruction per clock for a warp, and owns a quarter of the registers
REGISTER_UNIT = 256  # registers are given to a warp in multiples of this
RESERVED_SHARED_MEMORY = 1024  # bytes that the system keeps for itself in every program
SPECIAL_PER_CLOCK = 16  # results of the special-function units of an SM
LOAD_STORE_BYTES_PER_CLOCK = 128  # of an SM: 32 lanes of 4 bytes


@dataclass(frozen=True)
class Architecture:
    """Limits and rates of a streaming multiprocessor (SM).

    Attributes:
        name: of the family.
        warps: resident warps.
        programs: resident programs (thread blocks).
        shared_memory: bytes for all resident programs.
        multiply_adds_per_clock: of float16 or bfloat16 into float32, dense, in the tensor cores.
        warp_share: share of that which ``mma.sync``, the instruction of one warp, can reach.

    Source: limits from the table of technical specifications by compute capability in the CUDA C++ Programming
    Guide; rates from the dense float16 figures of the A100, H100 and RTX PRO 6000 data sheets, divided by SMs and
    boost clock; ``warp_share`` on Hopper, where full rate takes ``wgmma``, from the microbenchmarks of Luo et al. 2024.
    """

    name: str
    warps: int
    programs: int
    shared_memory: int
    multiply_adds_per_clock: int
    warp_share: float = 1.0


ARCHITECTURES = {
    80: Architecture("Ampere", 64, 32, 164 * 1024, 1024),
    90: Architecture("Hopper", 64, 32, 228 * 1024, 2048, warp_share=0.62),
    120: Architecture("Blackwell", 48, 24, 100 * 1024, 512),
}


@dataclass(frozen=True)
class Device:
    """A GPU for which times are predicted.

    Attributes:
        name: as in its data sheet.
        capability: key in :data:`ARCHITECTURES`.
        sms: streaming multiprocessors.
        clock: their highest clock, in GHz.
        copy_bandwidth: bytes read and written per ns by a plain copy of large tensors, as measured on one.
    """

    name: str
    capability: int
    sms: int
    clock: float
    copy_bandwidth: float

    @property
    def bytes_per_clock(self) -> float:
        """Of device memory, for one SM."""
        return self.copy_bandwidth / (self.sms * self.clock)

    def nanoseconds(self, clocks: float) -> float:
        """Of ``clocks`` that every SM spends on one coordinate of its own."""
        return clocks / (self.sms * self.clock)


H200 = Device("H200", capability=90, sms=132, clock=1.98, copy_bandwidth=4300.0)

# Assumptions of the model, none of them measured yet: the share of its peak at which a busy unit runs,
ATTAINABLE = {"memory": 0.88, "issue": 0.7, "special": 0.9, "tensor": 0.8, "load/store": 0.75}
# and the clocks that one warp needs for an iteration, however many others there are.
CLOCKS_PER_INSTRUCTION = 4  # between two instructions of a warp, which mostly depend on one another
CLOCKS_OF_FIRST_LOAD = 1200  # until the first values of an iteration are there, memory being busy
CLOCKS_OF_BARRIER = 30
# A wgmma of 64 x 64 x 16 occupies the tensor cores for 32 clocks, one of 64 x 16 x 16 for 8, and there are as many of
# the one as of the other; then there is latency, of which other instructions of the warp cover a part.
CLOCKS_OF_TENSOR_WAIT = 24


@dataclass(frozen=True)
class Work:
    """What one coordinate costs (in the backward: one coordinate and step), in one SM.

    Attributes:
        instructions: issued, each for a warp.
        special: results of the special-function units.
        multiply_adds: in the tensor cores.
        shared_bytes: through shared memory, operands of ``wgmma`` and shuffles included.
        global_bytes: to and from global memory, in all lanes: values that several lanes load count several times.
        local_bytes: to and from local memory, that is spilled registers.
        issue_clocks: of the schedulers, for ``instructions``.
        special_clocks: of the special-function units.
        tensor_clocks: of the tensor cores.
        load_store_clocks: of the unit that all bytes above pass through.
        latency_clocks: how long an iteration of a loop takes a warp, by the coordinates in flight; an assumption.
    """

    instructions: float
    special: float
    multiply_adds: float
    shared_bytes: float
    global_bytes: float
    local_bytes: float
    issue_clocks: float
    special_clocks: float
    tensor_clocks: float
    load_store_clocks: float
    latency_clocks: float

    def __add__(self, other: Work) -> Work:
        return Work(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Work)})


@dataclass(frozen=True)
class Prediction:
    """Predicted, not measured, time per coordinate (in the backward: per coordinate and step).

    Attributes:
        device: name of the GPU.
        floor: ns that moving the bytes takes at the bandwidth of a plain copy.
        nanoseconds: ns that the kernel is predicted to take.
        limit: what it is predicted to wait for: a key of :data:`ATTAINABLE` or ``"latency"``.
    """

    device: str
    floor: float
    nanoseconds: float
    limit: str


def resident_warps(architecture: Architecture, registers: int, shared_memory: int, num_warps: int) -> int:
    """Warps of programs with ``num_warps`` each that an SM holds at once.

    Args:
        architecture: of the SM.
        registers: of a thread.
        shared_memory: bytes that a program asks for.
        num_warps: of a program.
    """
    of_a_warp = -(-registers * LANES // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS_OF_AN_SM // SCHEDULERS_OF_AN_SM // of_a_warp * SCHEDULERS_OF_AN_SM
    by_shared_memory = architecture.shared_memory // (shared_memory + RESERVED_SHARED_MEMORY)
    return num_warps * min(
        by_registers // num_warps, by_shared_memory, architecture.warps // num_warps, architecture.programs
    )


def work_of(counts: Counts, architecture: Architecture, *, num_warps: int, warps: int, tile: int) -> Work:
    """Work per coordinate of a loop that handles a tile in each iteration.

    Args:
        counts: instructions of one iteration.
        architecture: that they are for.
        num_warps: warps that work on a tile together.
        warps: resident warps of an SM.
        tile: coordinates of a tile.
    """
    of_warps = num_warps / tile  # what every warp does, per coordinate
    of_groups = of_warps / WARPS_OF_A_WARPGROUP
    rate = architecture.multiply_adds_per_clock
    shared_bytes = counts.shared_bytes * of_warps + counts.group_shared_bytes * of_groups
    global_bytes, local_bytes = counts.global_bytes * of_warps, counts.local_bytes * of_warps
    special = counts.special * LANES * of_warps
    by_warp, by_group = counts.warp_multiply_adds * of_warps, counts.group_multiply_adds * of_groups
    iteration = (
        counts.instructions * CLOCKS_PER_INSTRUCTION
        + CLOCKS_OF_FIRST_LOAD
        + counts.barriers * CLOCKS_OF_BARRIER
        + counts.group_waits * CLOCKS_OF_TENSOR_WAIT
    )
    return Work(
        instructions=counts.instructions * of_warps,
        special=special,
        multiply_adds=by_warp + by_group,
        shared_bytes=shared_bytes,
        global_bytes=global_bytes,
        local_bytes=local_bytes,
        issue_clocks=counts.instructions * of_warps / SCHEDULERS_OF_AN_SM,
        special_clocks=special / SPECIAL_PER_CLOCK,
        tensor_clocks=by_group / rate + by_warp / (rate * architecture.warp_share),
        load_store_clocks=(shared_bytes + global_bytes + local_bytes) / LOAD_STORE_BYTES_PER_CLOCK,
        latency_clocks=iteration / (warps / num_warps * tile),
    )


def predict(works: Sequence[Work], floor_bytes: int, device: Device) -> Prediction:
    """Time per coordinate (in the backward: and step): that of the slowest unit, if all others hide behind it.

    Args:
        works: of the loops that run one after the other.
        floor_bytes: of device memory that have to move.
        device: to predict for.
    """
    floor = floor_bytes / device.bytes_per_clock
    memory = floor / ATTAINABLE["memory"]
    total, by_unit = 0.0, dict.fromkeys(("issue", "special", "tensor", "load/store", "latency"), 0.0)
    for work in works:
        units = {
            "issue": work.issue_clocks / ATTAINABLE["issue"],
            "special": work.special_clocks / ATTAINABLE["special"],
            "tensor": work.tensor_clocks / ATTAINABLE["tensor"],
            "load/store": work.load_store_clocks / ATTAINABLE["load/store"],
            "latency": work.latency_clocks,
        }
        slowest = max(units, key=lambda unit: units[unit])
        by_unit[slowest] += units[slowest]
        total += units[slowest]
    return Prediction(
        device=device.name,
        floor=device.nanoseconds(floor),
        nanoseconds=device.nanoseconds(max(total, memory)),
        limit="memory" if memory >= total else max(by_unit, key=lambda unit: by_unit[unit]),
    )


def model() -> dict[str, Any]:
    """Rates and assumptions behind the predictions, as JSON-compatible values."""
    return {
        "device": {field.name: getattr(H200, field.name) for field in fields(Device)},
        "attainable": ATTAINABLE,
        "clocks_per_instruction": CLOCKS_PER_INSTRUCTION,
        "clocks_of_first_load": CLOCKS_OF_FIRST_LOAD,
        "clocks_of_barrier": CLOCKS_OF_BARRIER,
        "clocks_of_tensor_wait": CLOCKS_OF_TENSOR_WAIT,
    }

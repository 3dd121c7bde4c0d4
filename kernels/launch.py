"""How the kernels are launched: constants found offline (``l2l-fast kernels``, ``make tune``), not at run time."""

from dataclasses import dataclass

# The oldest architecture whose tensor cores take float16 products into float32 the way the kernels need.
MINIMUM_CAPABILITY = 80
# Triton 3.7 compiles the step to a kernel without a single store there, and not the backward at all.
BROKEN_CAPABILITIES = range(100, 120)


@dataclass(frozen=True)
class LaunchConfig:
    """Launch constants of one kernel.

    Args:
        programs_per_sm: programs of the persistent grid per multiprocessor, at most what its registers hold.
        num_warps: warps per program; the tile's order in memory is that of 4.
        num_stages: software pipelining depth of loops; 1 is none.
        maxnreg: cap on registers per thread, where the compiler goes beyond what ``programs_per_sm`` has.
        prefetch: let the in-place step load the state of layer 2 ahead of layer 1's work.
    """

    programs_per_sm: int
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None
    prefetch: bool = False

    def grid(self, tiles: int, multiprocessors: int) -> int:
        """Number of programs for so many tiles."""
        return min(tiles, self.programs_per_sm * multiprocessors)

    def options(self) -> dict[str, int | None]:
        """Keyword arguments of the launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


def step_in_place_config(capability: int) -> LaunchConfig:
    """For the step in place on compute capability ``capability`` (90 is 9.0).

    On 9.0 the tensor cores read weights from shared memory, and 128 registers are enough to have all loads of a tile
    under way at once, with 4 programs per multiprocessor. Elsewhere that takes 178; without it 138 do, for 3 programs.
    Without pipelining, for it costs registers, and 12 to 16 warps hide the latency of 20 KB of loads per program.
    """
    return LaunchConfig(programs_per_sm=4, prefetch=True) if capability == 90 else LaunchConfig(programs_per_sm=3)


def step_config(capability: int) -> LaunchConfig:
    """For the step out of place: the public order of the state costs an exchange, and up to 165 registers."""
    return LaunchConfig(programs_per_sm=3)


def backward_config(capability: int) -> LaunchConfig:
    """For the backward kernel on compute capability ``capability``.

    Left alone it takes all 255 registers of a thread, which leaves 8 warps per multiprocessor to hide the latency of
    its matrix products. On 9.0, with 168 there are 12, for 6 % more instructions and twice the spills, which the first
    cache is too small for beside 53 KB of shared memory per program: to be decided on a device. Elsewhere 86 KB of
    shared memory keep a second program out.
    """
    return LaunchConfig(programs_per_sm=3, maxnreg=168) if capability == 90 else LaunchConfig(programs_per_sm=1)

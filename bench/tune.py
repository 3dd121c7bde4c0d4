"""Times the kernels in every sensible launch configuration on this device: ``python bench/tune.py``.

What it finds goes into ``kernels/launch.py`` by hand; the library itself never searches. ``--dry-run`` goes through
everything in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch

Kernels = Literal["step_in_place", "backward"]

PROGRAMS: dict[Kernels, tuple[int, ...]] = {"step_in_place": (2, 3, 4, 5), "backward": (1, 2, 3)}
STAGES = (1, 2, 3)
REGISTERS: dict[Kernels, tuple[int | None, ...]] = {"step_in_place": (None, 128), "backward": (None, 168)}


def main(arguments: list[str]) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time every launch configuration on this device.")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases through Triton's interpreter on the CPU")
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run runs everything through Triton's interpreter")

    # Importing the cases defines the kernels, for the interpreter or for the device.
    from gpu_cases import FLOAT16, FLOAT32, INT8, chosen_config, configured, time_steps, time_unroll
    from gpu_measure import Bench, Section
    from gpu_report import ns_each
    from rich.console import Console
    from rich.table import Table

    from l2l_fast.kernels.launch import LaunchConfig

    def step(bench: Bench, state_dtype: torch.dtype) -> None:
        time_steps(bench, "step", [bench.sizes.forward], state_dtype=state_dtype)

    def backward(bench: Bench) -> None:
        time_unroll(bench, "", bench.sizes.steps[0], (bench.sizes.backward,), check_all=False)

    cases: dict[str, tuple[Kernels, Callable[[Bench], None]]] = {
        "step, float32 state": ("step_in_place", partial(step, state_dtype=FLOAT32)),
        "step, float16 state": ("step_in_place", partial(step, state_dtype=FLOAT16)),
        "step, int8 state": ("step_in_place", partial(step, state_dtype=INT8)),
        "unroll backward": ("backward", backward),
    }
    table = Table("case", "programs per SM", "stages", "registers", "prefetch", "ns each", "", box=None, pad_edge=False)
    for case, (kernels, run) in cases.items():
        ahead = (True, False) if kernels == "step_in_place" else (False,)
        choices = itertools.product(STAGES, REGISTERS[kernels], ahead, PROGRAMS[kernels])
        for stages, registers, prefetch, programs in itertools.islice(choices, 2 if options.dry_run else None):
            config = LaunchConfig(programs, num_stages=stages, maxnreg=registers, prefetch=prefetch)
            bench = Bench(Section(case))
            cells = (case, str(programs), str(stages), str(registers or ""), "yes" if prefetch else "")
            print(*cells, flush=True)
            try:
                with configured(kernels, config):
                    run(bench)
            except Exception as error:  # the compiler or the device may refuse a configuration
                table.add_row(*cells, "", repr(error)[:60])
                continue
            row = bench.section.rows[0].to_dict()
            chosen = "chosen" if config == chosen_config(bench, kernels) else ""
            table.add_row(*cells, f"{ns_each(row):.4f}", chosen if row["verdict"] == "ok" else row["verdict"])
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

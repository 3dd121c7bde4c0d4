"""Times on a device, each behind a check against float64."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps

Run = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """How large the cases are: numbers of coordinates, unless said otherwise."""

    copied: int = 2**30  # float32 numbers
    forward: int = 2**24
    backward: int = 2**22
    baselines: tuple[int, ...] = (2**20, 2**24)
    eager_unroll: int = 2**16  # autograd keeps 1.4 KB for each and step
    steps: tuple[int, ...] = (20, 100)
    tensors: int = 200  # that share `forward` coordinates
    launch_bound: int = 10_000
    small_tensors: int = 1000  # that share `launch_bound` coordinates
    model_tensors: int = 1000  # of a model, at most
    model_tensor: int = 2**40  # of them each, at most
    checked: int = 4096  # of a forward
    checked_backward: int = 2**16 + 17
    warm_up: float = 0.2  # seconds: an idle device clocks down
    rounds: int = 20
    budget: float = 1.0  # seconds for all rounds, which are five at least


DRY_RUN = Sizes(
    copied=1000,
    forward=70,
    backward=70,
    baselines=(66, 70),
    eager_unroll=66,
    steps=(2, 3),
    tensors=4,
    launch_bound=66,
    small_tensors=6,
    model_tensors=4,
    model_tensor=17,
    checked=64,
    checked_backward=66,
    warm_up=0,
    rounds=1,
)


@dataclass(frozen=True)
class Check:
    """The comparison that came out worst: the largest error against float64, and how large it may be."""

    quantity: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # false for NaN


@dataclass
class Row:
    """One timed case.

    Attributes:
        seconds: median of one call.
        fastest: the fastest call.
        rounds: how many calls were timed.
        coordinate_steps: work of one call.
        bytes_each: device memory that has to move per coordinate and step.
        peak_bytes: memory allocated at most during one call, over what was allocated before.
        verdict: ``"ok"`` or ``"WRONG"``.
    """

    case: str
    seconds: float
    fastest: float
    rounds: int
    coordinate_steps: int = 0
    bytes_each: float = 0
    peak_bytes: int | None = None
    check: Check | None = None
    note: str = ""
    verdict: str = "ok"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Section:
    """What one section of the suite found; ``error`` is the traceback if it broke off."""

    name: str
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """Runs cases on ``device`` and collects rows; without a device, a dry run at sizes that tell nothing.

    Args:
        section: takes the rows.
        on_row: called when it has taken one.
    """

    def __init__(self, section: Section, on_row: Callable[[], None] = lambda: None) -> None:
        self.dry_run = not torch.cuda.is_available()
        self.device = torch.device("cpu" if self.dry_run else "cuda")
        self.sizes = DRY_RUN if self.dry_run else Sizes()
        self.section = section
        self._on_row = on_row

    def synchronize(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def add(
        self,
        case: str,
        run: Run,
        check: Check | None,
        *,
        coordinate_steps: int = 0,
        bytes_each: float = 0,
        memory: bool = False,
        note: str = "",
        timer: Callable[[Run], list[float]] | None = None,
    ) -> None:
        """Time ``run`` and keep the row. A case whose check failed is timed all the same, and marked.

        Args:
            memory: measure the peak of one call too.
            timer: instead of :meth:`device_seconds`.
        """
        peak = self._peak(run) if memory else None
        seconds = (timer or self.device_seconds)(run)
        row = Row(
            case,
            statistics.median(seconds),
            min(seconds),
            len(seconds),
            coordinate_steps,
            bytes_each,
            peak,
            check,
            note,
            "ok" if check is None or check.passed else "WRONG",
        )
        self.section.rows.append(row)
        each = f"{1e9 * row.seconds / coordinate_steps:.4f} ns each" if coordinate_steps else ""
        print(f"  {case}: {1e6 * row.seconds:.1f} us {each} {row.verdict}", flush=True)
        self._on_row()

    def device_seconds(self, run: Run) -> list[float]:
        """Seconds of single calls between two events on the current stream; on the CPU by the clock.

        The host runs ahead, so that a call is launched while the one before it still runs: what costs the host
        more time than the device shows the host's.
        """
        if self.dry_run:
            return self.host_seconds(run)
        each = self._warm_up(run)
        rounds = max(5, min(self.sizes.rounds, int(self.sizes.budget / each)))
        event = partial(torch.cuda.Event, enable_timing=True)
        pairs = [(event(), event()) for _ in range(rounds)]
        run()
        for start, end in pairs:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def host_seconds(self, run: Run, prepare: Run = lambda: None) -> list[float]:
        """Seconds until single calls return, whatever the device still has to do; ``prepare`` comes before each."""
        self._warm_up(run)
        seconds = []
        for _ in range(self.sizes.rounds):
            prepare()
            self.synchronize()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        self.synchronize()
        return seconds

    def _warm_up(self, run: Run) -> float:
        """Compiles what there is to compile and wakes the device; returns the seconds of the last call."""
        begin = time.perf_counter()
        while True:
            start = time.perf_counter()
            run()
            self.synchronize()
            now = time.perf_counter()
            if now - begin >= self.sizes.warm_up:
                return now - start

    def _peak(self, run: Run) -> int | None:
        if self.dry_run:
            return None
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak


def compare(
    actual: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    *,
    factor: float = 2.0,
    ulps: float = 1.0,
    stored: Mapping[str, torch.dtype] | None = None,
) -> Check:
    """The rule of ``tests/numerics.py``: at most ``factor`` times float32 eager's error, plus ``ulps`` of the scale.

    Args:
        stored: storage dtype of what was rounded when it was stored; half an ulp of it is allowed on top.
    """
    checks = []
    for name, right in exact.items():
        value, by_eager = actual[name].to(right), eager[name].to(right)
        error = (value - right).abs()
        dtype = (stored or {}).get(name, torch.float32)
        if dtype != torch.float32:
            info = torch.finfo(dtype)
            error = (error - right.abs() * info.eps / 2 - info.smallest_normal * info.eps).clamp(min=0)
        bound = factor * (by_eager - right).abs().max() + ulps * EPSILON * right.abs().max()
        checks.append(Check(name, error.max().item(), bound.item()))
    # A NaN is the worst of all.
    return max(checks, key=lambda check: float("inf") if check.error != check.error else check.error / check.bound)


def close(quantity: str, actual: Tensor, expected: Tensor, tolerance: float) -> Check:
    """Relative error in the Euclidean norm."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return Check(quantity, difference.item(), tolerance)


_QUERY = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def device_state() -> str:
    """Clocks, power and temperature at this moment, read and left as they are; empty without ``nvidia-smi``."""
    return nvidia_smi(_QUERY)


def nvidia_smi(query: str) -> str:
    """What ``nvidia-smi`` says of the first device; empty where it is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""

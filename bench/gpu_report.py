"""Results of the suite for CUDA devices as Markdown and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

Results = dict[str, Any]  # as JSON has it: facts of the run, and "sections" with their rows
HEADER = ("case", "time", "ns each", "GB/s", "of copy", "peak memory", "error / bound", "verdict", "note")


def _rows(results: Results, section: str) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for entry in results["sections"] if entry["name"] == section for row in entry["rows"]}


def ns_each(row: dict[str, Any]) -> float | None:
    """Nanoseconds per coordinate and step."""
    return 1e9 * row["seconds"] / row["coordinate_steps"] if row["coordinate_steps"] else None


def bandwidth(row: dict[str, Any]) -> float | None:
    """Bytes per second that had to move."""
    return row["bytes_each"] * row["coordinate_steps"] / row["seconds"] if row["bytes_each"] else None


def copy_bandwidth(results: Results) -> float | None:
    """Bytes per second that a copy read and wrote."""
    row = next(iter(_rows(results, "copy").values()), None)
    return bandwidth(row) if row else None


def cells(row: dict[str, Any], ceiling: float | None) -> tuple[str, ...]:
    """A row under :data:`HEADER`."""
    each, moved, peak, check = ns_each(row), bandwidth(row), row["peak_bytes"], row["check"]
    return (
        row["case"],
        _seconds(row["seconds"]),
        f"{each:.4f}" if each else "",
        f"{moved / 1e9:.0f}" if moved else "",
        f"{moved / ceiling:.1%}" if moved and ceiling else "",
        f"{peak / 2**20:.1f} MiB" if peak is not None else "",
        f"{_error(check['error'])} / {_error(check['bound'])}" if check else "",
        row["verdict"],
        row["note"],
    )


def _error(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.1e}"  # JSON has no NaN


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} us"


def wrong(results: Results) -> list[str]:
    """Everything that makes the run a failure."""
    found = [f"{name}: {error.splitlines()[-1]}" for name, error in _errors(results)]
    return found + [
        f"{entry['name']}: {row['case']} is WRONG"
        for entry in results["sections"]
        for row in entry["rows"]
        if row["verdict"] != "ok"
    ]


def _errors(results: Results) -> list[tuple[str, str]]:
    return [(entry["name"], entry["error"]) for entry in results["sections"] if entry["error"]]


@dataclass(frozen=True)
class Target:
    """A bound on a number that follows from the rows; ``None`` where a row is missing."""

    what: str
    measure: Callable[[Results], float | None]
    at_most: float | None = None
    at_least: float | None = None

    def cells(self, results: Results) -> tuple[str, str, str, str]:
        bound = f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"
        value = self.measure(results)
        if value is None:
            return self.what, bound, "", "not measured"
        if results["dry_run"]:
            return self.what, bound, f"{value:.3g}", "a dry run"
        met = value <= self.at_most if self.at_most is not None else value >= (self.at_least or 0)
        return self.what, bound, f"{value:.3g}", "met" if met else "MISSED"


def _value(section: str, case: str, of: Callable[[dict[str, Any]], float | None]) -> Callable[[Results], float | None]:
    """A number of the first row of that section whose case begins so."""

    def measure(results: Results) -> float | None:
        row = next((row for name, row in _rows(results, section).items() if name.startswith(case)), None)
        return of(row) if row else None

    return measure


def _ratio(
    over: Callable[[Results], float | None], under: Callable[[Results], float | None]
) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        above, below = over(results), under(results)
        return above / below if above is not None and below else None

    return measure


def _fastest_compiled(results: Results) -> float | None:
    times = [
        row["seconds"]
        for case, row in _rows(results, "baselines").items()
        if case.startswith("torch.compile") and row["coordinate_steps"] == _largest(results)
    ]
    return min(times, default=None)


def _eager(results: Results) -> float | None:
    rows = _rows(results, "baselines").items()
    times = [
        row["seconds"]
        for case, row in rows
        if case.startswith("eager") and row["coordinate_steps"] == _largest(results)
    ]
    return min(times, default=None)


def _largest(results: Results) -> int:
    return max((row["coordinate_steps"] for row in _rows(results, "baselines").values()), default=0)


def _time(row: dict[str, Any]) -> float | None:
    seconds: float = row["seconds"]
    return seconds


_FORWARD = ("forward", "float32 state")
_NARROW = ("16-bit storage", "float16 state, float32")

TARGETS = (
    Target("step, float32 state, ns per coordinate (H200)", _value(*_FORWARD, ns_each), at_most=0.175),
    Target(
        "step, float32 state, share of the copy bandwidth",
        _ratio(_value(*_FORWARD, bandwidth), copy_bandwidth),
        at_least=0.87,
    ),
    Target("step, float16 state, ns per coordinate (H200)", _value(*_NARROW, ns_each), at_most=0.10),
    Target("eager / fused, float32 state", _ratio(_eager, _value(*_FORWARD, _time)), at_least=5),
    Target("eager / fused, float16 state", _ratio(_eager, _value(*_NARROW, _time)), at_least=10),
    Target("torch.compile / fused, float32 state", _ratio(_fastest_compiled, _value(*_FORWARD, _time)), at_least=2.5),
    Target(
        "ragged tensors / one tensor, float32 state",
        _ratio(
            _value("ragged tensors", "float32 state, ragged", _time),
            _value("ragged tensors", "float32 state, one", _time),
        ),
        at_most=1.05,
    ),
    Target(
        "host time of step() over many tensors / that of AdamW(foreach)",
        _ratio(_value("launch-bound", "LearnedOptimizer,", _time), _value("launch-bound", "AdamW(foreach),", _time)),
        at_most=1.0,
    ),
    Target(
        "unroll backward, ns per coordinate and step (H200)", _value("unroll backward", "T = ", ns_each), at_most=0.45
    ),
)


def _title(results: Results) -> str:
    return "A dry run: no number here means anything" if results["dry_run"] else results["device"]


def markdown(results: Results) -> str:
    """The whole report."""
    facts = ", ".join(f"{name} {value}" for name, value in results["facts"].items() if value)
    ceiling = copy_bandwidth(results)
    lines = [
        f"# {_title(results)}",
        "",
        f"{facts}.",
        "",
        "Times are medians of single calls between CUDA events, behind a warm-up; every case has first been compared "
        "with float64, and the error that came closest to its bound is stated. *ns each* is per coordinate and step; "
        "GB/s counts the bytes that have to move; *of copy* is the share of what a copy reads and writes; peak memory "
        "is on top of the inputs.",
        "",
        *_table(("target", "bound", "measured", ""), [target.cells(results) for target in TARGETS]),
    ]
    for entry in results["sections"]:
        lines += ["", f"## {entry['name']} ({entry['seconds']:.0f} s)"]
        if entry["facts"]:
            lines += ["", *(f"- {name}: {value}" for name, value in entry["facts"].items())]
        if entry["rows"]:
            lines += ["", *_table(HEADER, [cells(row, ceiling) for row in entry["rows"]])]
        if entry["error"]:
            lines += ["", "```", entry["error"].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    used = [column for column, name in enumerate(header) if any(row[column] for row in rows)]
    return [
        "| " + " | ".join(header[column] for column in used) + " |",
        "|" + "---|" * len(used),
        *("| " + " | ".join(row[column] for column in used) + " |" for row in rows),
    ]


def terminal(results: Results) -> list[Table]:
    """Two compact tables: every row, and the targets."""
    ceiling = copy_bandwidth(results)
    everything = Table("section", *HEADER[:-1], title=_title(results), box=None, pad_edge=False)
    for entry in results["sections"]:
        for row in entry["rows"]:
            everything.add_row(entry["name"], *cells(row, ceiling)[:-1])
        if entry["error"]:
            everything.add_row(entry["name"], f"BROKE OFF: {entry['error'].splitlines()[-1]}")
    targets = Table("target", "bound", "measured", "", box=None, pad_edge=False)
    for target in TARGETS:
        targets.add_row(*target.cells(results))
    return [everything, targets]

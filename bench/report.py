"""Turns the JSON of a benchmark run into a Markdown report and a plot: ``python bench/report.py RESULTS.json``."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

# Points (coordinates, nanoseconds) by what was run, by kind of work.
Series = dict[str, dict[str, list[tuple[int, float]]]]

USAGE = "usage: python bench/report.py RESULTS.json  (writes RESULTS.md and RESULTS.png beside it)"


def label(benchmark: dict[str, Any]) -> str:
    """What a benchmark ran, without what its group already says."""
    case = benchmark["name"].removeprefix("test_").partition("[")[0]
    params = benchmark["params"] or {}
    words = [str(value) for key, value in params.items() if key in ("backend", "name", "instruction_set")]
    if "state_dtype" in params:
        words.append(f"{params['state_dtype']} state")
    return " ".join([case.replace("_", " "), *words])


def is_eager(name: str) -> bool:
    """Whether this is the plain PyTorch baseline of its group."""
    return "eager" in name or name.endswith("reference")


def by_group(benchmarks: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Benchmarks of one group together, in the order of the run."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for benchmark in benchmarks:
        groups[benchmark["group"]].append(benchmark)
    return groups


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    machine = results["machine_info"]
    cpu = machine.get("cpu", {}).get("brand_raw", machine.get("processor", "unknown CPU"))
    lines = [
        "# Benchmarks",
        "",
        f"{cpu}, {machine['instruction_set']} chosen, {machine['threads']} thread(s), "
        f"{machine['fma_peak_gflops']:.0f} GFLOP/s measured FMA peak per thread; Python {machine['python']}, "
        f"torch {machine['torch']}, l2l_fast {machine['l2l_fast']}; {results['datetime'][:10]}.",
        "",
        "Best time of all rounds. Ratios are to plain PyTorch in the same process, where it was run; the share of the "
        "FMA peak is that of the instruction set in use. Peak memory is the rise of the resident set in a process of "
        "its own.",
    ]
    for group, benchmarks in by_group(results["benchmarks"]).items():
        if "peak_memory_mib" in benchmarks[0]["extra_info"]:
            lines += ["", f"## {group}", "", "| case | peak memory |", "|---|---|"]
            lines += [f"| {label(b)} | {b['extra_info']['peak_memory_mib']:.0f} MiB |" for b in benchmarks]
            continue
        stateful = "state_bytes" in benchmarks[0]["extra_info"]
        eager = next((b["stats"]["min"] for b in benchmarks if is_eager(label(b))), None)
        lines += [
            "",
            f"## {group}",
            "",
            f"| case | ns per coordinate and step | x eager | FMA peak |{' state |' * stateful}",
            "|---|---|---|---|" + "---|" * stateful,
        ]
        for benchmark in benchmarks:
            info, seconds = benchmark["extra_info"], benchmark["stats"]["min"]
            ratio = f"{eager / seconds:.2f}" if eager else ""
            share = f"{info['share_of_fma_peak']:.1%}" if info["share_of_fma_peak"] else ""
            state = f" {info['state_bytes'] / 2**20:.0f} MiB |" if stateful else ""
            lines.append(f"| {label(benchmark)} | {info['ns_per_coordinate_step']:.1f} | {ratio} | {share} |{state}")
    return "\n".join(lines) + "\n"


def lines_to_plot(results: dict[str, Any]) -> Series:
    """What was timed at several sizes; a single one is a number for the table and no line."""
    measured: Series = defaultdict(lambda: defaultdict(list))
    for benchmark in results["benchmarks"]:
        kind, _, rest = benchmark["group"].partition(" n=")
        tensors = rest.partition("tensors=")[2]
        if tensors not in ("", "1"):
            continue
        info = benchmark["extra_info"]
        if "ns_per_coordinate_step" not in info:
            continue
        measured[kind][label(benchmark)].append((info["n"], info["ns_per_coordinate_step"]))
    return {kind: lines for kind, lines in measured.items() if any(len(points) > 1 for points in lines.values())}


def plot(series: Series, path: Path) -> None:
    """Nanoseconds per coordinate and step over the number of coordinates, one panel per kind of work."""
    figure, axes = plt.subplots(1, len(series), figsize=(5 * len(series), 4.5), squeeze=False, layout="constrained")
    for axis, (kind, lines) in zip(axes[0], series.items(), strict=True):
        for name, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            axis.plot(x, y, marker="o", markersize=3, linestyle="--" if is_eager(name) else "-", label=name)
        axis.set(title=kind, xscale="log", yscale="log", xlabel="coordinates")
        axis.grid(which="major", alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("ns per coordinate and step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Write the report; returns the exit code."""
    if len(arguments) != 1:
        print(USAGE, file=sys.stderr)
        return 2
    source = Path(arguments[0])
    if not source.is_file():
        print(f"error: there is no file {source}; make bench writes runs/bench/results.json", file=sys.stderr)
        return 2
    results = json.loads(source.read_text())
    text = markdown(results)
    source.with_suffix(".md").write_text(text)
    print(text)
    print(f"wrote {source.with_suffix('.md')}")
    if series := lines_to_plot(results):
        plot(series, source.with_suffix(".png"))
        print(f"wrote {source.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

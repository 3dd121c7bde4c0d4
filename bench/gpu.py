"""The suite for a CUDA device: ``python bench/gpu.py``; ``make gpu`` runs the tests first.

Writes ``<device>-<date>.json`` and ``.md`` to the output folder after every section, so that a run cut short leaves
what it had. Sections run in a process of their own, which is started anew when one of them fails: a device that has
faulted serves its process no more. The exit code is 1 if a section failed or a result was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

import gpu_report
import torch
from gpu_measure import Bench, Section, device_state, nvidia_smi
from rich.console import Console

from l2l_fast.experiments.machine import machine
from l2l_fast.experiments.output import prepare_folder, write_bytes, write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results"

MINUTES = 9.5  # for everything
SECTION_MINUTES = 7.0  # for the sections; what finds no time is named in the results
ROW_LIMIT = 180.0  # seconds between two rows; the first use of a kernel compiles it

_UNFINISHED = "did not finish"
_STOPPED_AT_A_FAILURE = 3  # exit code of a worker


class Report:
    """The results so far, in a file and its Markdown beside it."""

    def __init__(self, path: Path, results: gpu_report.Results) -> None:
        self.path = path
        self.results = results

    @property
    def sections(self) -> list[dict[str, Any]]:
        sections: list[dict[str, Any]] = self.results["sections"]
        return sections

    def put(self, section: Section) -> None:
        """Add a section, or replace the last one of that name, and write everything."""
        self.results["sections"] = [entry for entry in self.sections if entry["name"] != section.name]
        self.sections.append(section.to_dict())
        self.save()

    def save(self) -> None:
        write_json(self.path, self.results)
        write_bytes(self.path.with_suffix(".md"), gpu_report.markdown(self.results).encode())

    def reload(self) -> None:
        self.results = json.loads(self.path.read_text())


def work(path: Path) -> int:
    """Run the sections that have no result yet, until one fails; returns the exit code of the worker."""
    if "TRITON_INTERPRET" in os.environ:
        import interpreter

        interpreter.patch_once()
        interpreter.round_to_bfloat16()
        interpreter.fuse_multiply_add()
    # The kernels are defined here, for the device or for the interpreter.
    from gpu_cases import SECTIONS

    report = Report(path, {})
    report.reload()
    torch.set_num_threads(os.cpu_count() or 1)
    done = {entry["name"] for entry in report.sections}
    for name, run in SECTIONS.items():
        if name in done:
            continue
        section = Section(name, error=_UNFINISHED)
        bench = Bench(section, on_row=partial(report.put, section))
        report.put(section)
        print(name, flush=True)
        begin = time.perf_counter()
        try:
            run(bench)
            section.error = None
        except Exception:
            section.error = traceback.format_exc()
        section.seconds = time.perf_counter() - begin
        report.put(section)
        if section.error:
            print(section.error, flush=True)
            return _STOPPED_AT_A_FAILURE
        if not bench.dry_run:
            torch.cuda.empty_cache()
    return 0


def supervise(report: Report, environment: dict[str, str], deadline: float) -> None:
    """Start workers until all sections have a result or the time is over."""
    while True:
        begun = len(report.sections)
        reason = _run_worker(report.path, environment, deadline)
        report.reload()
        if reason is None:
            return
        last = report.sections[-1] if len(report.sections) > begun else None
        if last is None:
            report.put(Section("worker", error=f"no section could be begun: {reason}"))
            return
        if last["error"] == _UNFINISHED:
            last["error"] = reason
            report.save()
        if time.monotonic() > deadline:
            report.put(Section("rest", error=f"left out: {SECTION_MINUTES:g} minutes were over"))
            return


def _run_worker(path: Path, environment: dict[str, str], deadline: float) -> str | None:
    """Why the worker ended before everything was done, or ``None``."""
    process = subprocess.Popen([sys.executable, __file__, "--worker", str(path)], env=environment)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() > deadline:
                return f"stopped: {SECTION_MINUTES:g} minutes were over"
            if time.time() - path.stat().st_mtime > ROW_LIMIT:
                return f"stopped: it took longer than {ROW_LIMIT:g} s"
    finally:
        process.kill()
        process.wait()
    return None if process.returncode == 0 else f"the process ended with exit code {process.returncode}"


def tests_section(path: Path) -> Section:
    """What a test run left in its JUnit file: the counts, and the failures by name."""
    section = Section("tests")
    if not path.is_file():
        section.error = f"there is no {path.name}: the tests were not run"
        return section
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    section.facts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    section.seconds = float(suite.get("time", 0))
    failed = [
        f"{case.get('classname')}.{case.get('name')}: {' '.join((problem.get('message') or '').splitlines()[:1])}"
        for case in suite.iter("testcase")
        for problem in case
        if problem.tag in ("failure", "error")
    ]
    if failed:
        section.error = "\n".join([*failed, f"{len(failed)} tests failed"])
    return section


def sanitizer_section(environment: dict[str, str], deadline: float, dry_run: bool) -> Section:
    """A small case under compute-sanitizer; a tool that can't run is no pass."""
    section = Section("compute-sanitizer")
    begin = time.perf_counter()
    script = [sys.executable, str(HERE / "gpu_small.py")]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None and not dry_run:
        section.error = "compute-sanitizer is not on the PATH"
        return section
    # Every tensor an allocation of its own, so that an access beyond it is seen.
    environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # The kernels get compiled outside, where that is fast.
    tools: dict[str, list[str]] = {"without a tool": []}
    if sanitizer and not dry_run:
        options = ["--target-processes", "application-only", "--error-exitcode", "86", "--print-limit", "20"]
        tools |= {tool: [sanitizer, "--tool", tool, *options] for tool in ("memcheck", "racecheck")}
    problems = []
    for tool, prefix in tools.items():
        try:
            run = subprocess.run(
                [*prefix, *script],
                env=environment,
                capture_output=True,
                text=True,
                timeout=max(1.0, deadline - time.monotonic()),
                check=False,
            )
        except subprocess.TimeoutExpired:
            section.facts[tool] = "did not finish in time"
            problems.append(f"{tool}: {section.facts[tool]}")
            continue
        output = run.stdout + run.stderr
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        clean = all(line.startswith("0 ") for line in summary) and (bool(summary) or not prefix)
        section.facts[tool] = "; ".join(summary) if summary else f"exit code {run.returncode}"
        if run.returncode != 0 or not clean or "small case: done" not in output:
            problems.append(
                f"{output[-4000:]}\n{tool}: exit code {run.returncode}, {'found' if summary else 'could not run'}"
            )
    section.error = "\n".join(problems) or None
    section.seconds = time.perf_counter() - begin
    return section


def _facts(commit: str, dry_run: bool) -> tuple[str, dict[str, Any]]:
    """Name of the device, and everything that the numbers depend on."""
    facts = {"commit": commit, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    facts |= machine()
    if dry_run:
        return "dry-run", facts
    properties = torch.cuda.get_device_properties(0)
    return properties.name, facts | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "CUDA": torch.version.cuda,
        "driver": nvidia_smi("driver_version"),
        "before": device_state(),
    }


def main(arguments: list[str]) -> int:
    """Run the suite; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the suite for a CUDA device and write its results.")
    parser.add_argument(
        "--output", type=Path, help=f"folder of the results (default: {RESULTS.relative_to(HERE.parent)})"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny cases through Triton's interpreter on the CPU")
    parser.add_argument("--sanitize", action="store_true", help="run a small case under compute-sanitizer as well")
    parser.add_argument("--commit", default="", help="version of the source, for the results")
    parser.add_argument("--tests", type=Path, help="JUnit file of a test run, to be summed up in the results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return work(options.worker)
    if options.dry_run and (options.output is None or options.output.resolve() == RESULTS.resolve()):
        parser.error("a dry run needs an --output of its own: its numbers mean nothing")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run runs everything through Triton's interpreter")

    begin = time.monotonic()
    environment = dict(os.environ)
    if options.dry_run:
        modules = os.pathsep.join([str(HERE.parent / "tests"), *filter(None, [environment.get("PYTHONPATH")])])
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": modules}
    device, facts = _facts(options.commit, options.dry_run)
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = prepare_folder(options.output or RESULTS) / f"{slug}-{facts['date'][:10]}.json"
    report = Report(path, {"device": device, "dry_run": options.dry_run, "facts": facts, "sections": []})
    report.save()
    if options.tests:
        report.put(tests_section(options.tests))
    supervise(report, environment, begin + 60 * SECTION_MINUTES)
    if options.sanitize:
        report.put(sanitizer_section(environment, begin + 60 * MINUTES, options.dry_run))

    console = Console(width=150)
    for table in gpu_report.terminal(report.results):
        console.print(table)
    failures = gpu_report.wrong(report.results)
    for failure in failures:
        console.print(f"[bold red]{failure}")
    print(f"wrote {path} and {path.with_suffix('.md')}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

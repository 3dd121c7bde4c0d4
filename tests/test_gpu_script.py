"""The suite for a CUDA device goes through without one, and says what went wrong where something did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu
import gpu_report
import pytest
import torch
from gpu_cases import SECTIONS, ragged_sizes
from gpu_measure import Bench, Check, Row, Section, close, compare

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu.py"

without_a_device = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")


def run(*arguments: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """Results, Markdown and output of one dry run of everything."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "tests.xml").write_text(
        '<testsuites><testsuite tests="2" failures="0" errors="0" skipped="0" time="1.5">'
        '<testcase classname="a" name="b"/><testcase classname="a" name="c"/></testsuite></testsuites>'
    )
    result = run(
        str(SCRIPT), "--dry-run", "--sanitize", "--output", str(folder), "--tests", str(folder / "tests.xml"),
        "--commit", "v1-dirty",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text(), result.stdout


def test_every_section_has_results(dry_run: tuple[dict[str, Any], str, str]) -> None:
    results, _, _ = dry_run
    assert [entry["name"] for entry in results["sections"]] == ["tests", *SECTIONS, "compute-sanitizer"]
    for entry in results["sections"]:
        assert entry["error"] is None
        assert entry["rows"] or entry["facts"], entry["name"]
        for row in entry["rows"]:
            assert row["seconds"] > 0
            assert row["verdict"] == "ok"
    assert results["dry_run"] is True
    assert results["facts"]["commit"] == "v1-dirty"
    assert results["facts"]["triton"]


def test_fused_cases_are_checked(dry_run: tuple[dict[str, Any], str, str]) -> None:
    for entry in dry_run[0]["sections"]:
        for row in entry["rows"]:
            other = row["case"].startswith(("eager, T", "AdamW")) and entry["name"] != "AdamW"
            assert (row["check"] is None) == other, row["case"]


def test_a_dry_run_says_so(dry_run: tuple[dict[str, Any], str, str]) -> None:
    _, text, output = dry_run
    assert text.startswith("# A dry run")
    assert "met" not in text.split("##")[0].replace("method", "")
    assert "A dry run" in output


@without_a_device
def test_without_a_device_it_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--output", str(tmp_path)])
    assert "no CUDA device; --dry-run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", [(), ("--output", str(gpu.RESULTS))], ids=["default", "named"])
def test_a_dry_run_does_not_write_among_the_results(
    output: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--dry-run", *output])
    assert "--output of its own" in capsys.readouterr().err


@without_a_device
def test_device_tests_fail_where_they_are_asked_for_and_can_not_run() -> None:
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda/test_cuda_graphs.py")
    assert result.returncode == 1
    assert "needs a CUDA device" in result.stdout
    assert "passed" not in result.stdout


def test_device_tests_run_dry_as_far_as_they_can() -> None:
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--gpu-dry-run", "tests/cuda")
    assert result.returncode == 0, result.stdout[-4000:]


def test_tuning_runs_dry() -> None:
    result = run(str(ROOT / "bench" / "tune.py"), "--dry-run")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "unroll backward" in result.stdout
    assert "Error" not in result.stdout


# A worker that fails


@pytest.fixture
def report(tmp_path: Path) -> gpu.Report:
    report = gpu.Report(tmp_path / "results.json", {"device": "none", "dry_run": False, "facts": {}, "sections": []})
    report.save()
    return report


def broken_worker(tmp_path: Path, body: str) -> Path:
    """A script that runs a worker over sections of its own."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path[:0] = [{str(ROOT / 'bench')!r}, {str(ROOT / 'tests')!r}]\n"
        "import gpu, gpu_cases\n"
        "from gpu_measure import Bench\n"
        f"{body}\n"
        "gpu_cases.SECTIONS.clear()\n"
        "gpu_cases.SECTIONS.update(first=first, second=second)\n"
        "sys.exit(gpu.main(sys.argv[1:]))\n"
    )
    return script


GOOD = "def second(bench: Bench) -> None:\n    bench.add('fine', lambda: None, None)\n"
BAD = {
    "raises": ("def first(bench: Bench) -> None:\n    raise ValueError('of its own')\n", "ValueError: of its own"),
    "dies": ("def first(bench: Bench) -> None:\n    os._exit(9)\n", "the process ended with exit code 9"),
}


@pytest.mark.parametrize(("body", "reason"), BAD.values(), ids=BAD)
def test_one_broken_section_does_not_lose_the_rest(
    report: gpu.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: str
) -> None:
    monkeypatch.setattr(gpu, "__file__", str(broken_worker(tmp_path, body + GOOD)))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    gpu.supervise(report, environment, deadline=float("inf"))
    first, second = report.sections
    assert reason in first["error"]
    assert second["error"] is None
    assert [row["case"] for row in second["rows"]] == ["fine"]
    assert gpu_report.wrong(report.results) == [f"first: {first['error'].splitlines()[-1]}"]
    assert first["error"] in report.path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("limit", "deadline", "reason"),
    [(0.5, float("inf"), "it took longer than 0.5 s"), (60.0, 0.0, "7 minutes were over")],
    ids=["section", "all"],
)
def test_a_worker_that_hangs_is_ended(
    report: gpu.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, deadline: float, reason: str
) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "ROW_LIMIT", limit)
    gpu.supervise(report, dict(os.environ), deadline)
    assert [entry["error"] for entry in report.sections] == [f"no section could be begun: stopped: {reason}"]


def test_a_worker_that_can_not_start_ends_the_run(
    report: gpu.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit(5)")
    monkeypatch.setattr(gpu, "__file__", str(script))
    gpu.supervise(report, dict(os.environ), deadline=float("inf"))
    assert [entry["error"] for entry in report.sections] == [
        "no section could be begun: the process ended with exit code 5"
    ]


# What the results say


@pytest.fixture
def bench() -> Bench:
    return Bench(Section("a section"))


@pytest.mark.parametrize("error", [2.0, float("nan")])
def test_a_wrong_result_makes_the_run_a_failure(bench: Bench, report: gpu.Report, error: float) -> None:
    bench.add("right", lambda: None, Check("x", 1.0, 1.0), coordinate_steps=1)
    bench.add("wrong", lambda: None, Check("x", error, 1.0), coordinate_steps=1)
    report.put(bench.section)
    report.reload()
    assert gpu_report.wrong(report.results) == ["a section: wrong is WRONG"]
    assert "| WRONG |" in gpu_report.markdown(report.results)


def test_failed_tests_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    path.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="1" skipped="0" time="1.5">'
        '<testcase classname="a" name="b"/>'
        '<testcase classname="a" name="c"><failure message="assert 1 == 2&#10;more"/></testcase>'
        '<testcase classname="a" name="d"><error message="boom"/></testcase></testsuite></testsuites>'
    )
    section = gpu.tests_section(path)
    assert section.facts["tests"] == "3"
    assert section.error == "a.c: assert 1 == 2\na.d: boom\n2 tests failed"
    assert "there is no none.xml" in (gpu.tests_section(tmp_path / "none.xml").error or "")


def results_of(**cases: list[Row]) -> dict[str, Any]:
    sections = [Section(name.replace("_", " "), rows).to_dict() for name, rows in cases.items()]
    return {"device": "none", "dry_run": False, "facts": {}, "sections": sections}


def test_targets() -> None:
    n = 1000
    results = results_of(
        copy=[Row("device to device", 8e-6, 8e-6, 1, 1000, 8)],
        forward=[Row("float32 state", 0.16e-9 * n, 0, 1, n, 652)],
        baselines=[
            Row("eager, N = 1000", 0.64e-9 * n, 0, 1, n),
            Row("torch.compile of two LSTMCells, N = 1000", 0.48e-9 * n, 0, 1, n),
            Row("torch.compile of the formulas, N = 1000", 0.32e-9 * n, 0, 1, n),
            Row("eager, N = 10", 1.0, 0, 1, 10),
        ],
    )
    table = {target.what: target.cells(results)[2:] for target in gpu_report.TARGETS}
    assert table["step, float32 state, ns per coordinate (H200)"] == ("0.16", "met")
    assert table["eager / fused, float32 state"] == ("4", "MISSED")
    assert table["torch.compile / fused, float32 state"] == ("2", "MISSED")
    assert table["unroll backward, ns per coordinate and step (H200)"] == ("", "not measured")
    assert gpu_report.copy_bandwidth(results) == pytest.approx(1e9)


def test_every_target_finds_its_rows(dry_run: tuple[dict[str, Any], str, str]) -> None:
    """A case that was renamed would read as not measured for ever."""
    missing = [target.what for target in gpu_report.TARGETS if target.measure(dry_run[0]) is None]
    assert missing == []


# Checks


def test_compare_is_as_strict_as_the_tests() -> None:
    exact = {"x": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    eager = {"x": torch.tensor([1.0, -2.0 + 1e-6])}
    assert compare({"x": torch.tensor([1.0 + 1.5e-6, -2.0])}, eager, exact).passed
    assert not compare({"x": torch.tensor([1.0 + 4e-6, -2.0])}, eager, exact).passed
    assert not compare({"x": torch.tensor([1.0, float("nan")])}, eager, exact).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compare_allows_for_rounded_storage_and_no_more(dtype: torch.dtype) -> None:
    exact = {"x": torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    eager = {"x": exact["x"].float()}
    rounded = exact["x"].to(dtype)
    assert compare({"x": rounded.float()}, eager, exact, stored={"x": dtype}).passed
    assert not compare({"x": rounded.float()}, eager, exact).passed
    truncated = (rounded.view(torch.int16) + 1).view(dtype)
    assert not compare({"x": truncated.float()}, eager, exact, stored={"x": dtype}).passed


def test_close_does_not_pass_nan() -> None:
    ones = torch.ones(3)
    assert close("x", ones, ones, 0.0).passed
    assert not close("x", ones * float("nan"), ones, 1.0).passed


@pytest.mark.parametrize(("total", "tensors"), [(200, 4), (2**24, 200)])
def test_ragged_sizes_add_up(total: int, tensors: int) -> None:
    sizes = ragged_sizes(total, tensors)
    assert sum(sizes) == total
    assert len(sizes) == tensors
    assert max(sizes) > 2 * total / tensors

"""Kernels compiled to machine code, for which no GPU is needed: budgets, NaN handling, and the reader of that code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from l2l_fast.cli.app import app
from l2l_fast.experiments.cost_model import ARCHITECTURES, ATTAINABLE, H200, Work, predict, resident_warps, work_of
from l2l_fast.experiments.kernels import NanHandling, bodies, nan_handling
from l2l_fast.experiments.sass import Counts, Program, count, parse

CAPABILITIES = list(ARCHITECTURES)
FLOAT16, INT8 = "step, float16 state", "step, int8 state"

# Of a coordinate and step: 40 units take five exponentials and two reciprocals each; the backward repeats that, and
# takes ten of them for the derivatives. The features take a few more. A loop missed, or taken twice, shows here.
FORWARD_SPECIAL = 40 * 7
BACKWARD_SPECIAL = FORWARD_SPECIAL + 40 * 10
FEATURES_SPECIAL = 8
# Products of 16 inputs with all gates. A step has five such blocks, each taken in two parts to four.
BLOCK = 16 * 80
BLOCKS = range(5 * 2, 5 * 4 + 1)

# Addresses and the tensor's size are read by every lane, and the gradient by several: bytes per coordinate beyond the
# floor that never leave the caches, and so are the weights of the output layer. Without preprocessing a layer's
# weights for the gradient are among them too.
REPEATED_BYTES = {"log": 192, "identity": 352}
# Scales of an int8 state are read, and written under a mask, by all eight rows that share them; where some coordinates
# are skipped the old state is read once more to be stored again.
REPEATED_SCALES = 2 * (8 - 1) * 5
READ_AGAIN = 80 + 8 * 5


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``l2l-fast kernels`` writes, run where nothing is interpreted and nothing was compiled before."""
    folder = tmp_path_factory.mktemp("kernels")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "COLUMNS": "120"}
    command = [sys.executable, "-m", "l2l_fast", "kernels", "--arch", "all", "--json", str(folder / "kernels.json")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    read: dict[str, Any] = json.loads((folder / "kernels.json").read_text())
    read["printed"] = result.stdout
    return read


def compiled(report: dict[str, Any], *, per_step: bool, capability: int | None = None) -> list[dict[str, Any]]:
    """The backward kernels, if ``per_step``, or those of one step, for one architecture or all of them."""
    chosen = [
        kernel
        for kernel in report["kernels"]
        if kernel["per_step"] == per_step and capability in (None, kernel["capability"])
    ]
    assert chosen, f"no kernel for sm_{capability}"
    return chosen


def described(kernel: dict[str, Any]) -> str:
    return f"{kernel['name']} on sm_{kernel['capability']}: {kernel}"


def test_every_kernel_is_compiled_for_every_architecture(report: dict[str, Any]) -> None:
    names: dict[int, list[str]] = {capability: [] for capability in CAPABILITIES}
    for kernel in report["kernels"]:
        names[kernel["capability"]].append(kernel["name"])
    assert names[80] == names[90] == names[120]
    in_place = {"step, float32 state", "step, float16 state", "step, int8 state"}
    assert in_place | {"differentiable step", "unroll backward"} <= set(names[90])


def test_command_prints_every_kernel(report: dict[str, Any]) -> None:
    printed = report["printed"]
    assert "…" not in printed  # nothing was cut off
    for kernel in report["kernels"]:
        rows = re.findall(rf"^ +{re.escape(kernel['name'])} +\d", printed, re.MULTILINE)
        assert len(rows) == 2 * len(CAPABILITIES), kernel["name"]
    assert all(f"sm_{capability}" in printed for capability in CAPABILITIES)
    assert "not measured" in printed


def test_every_kernel_stores(report: dict[str, Any]) -> None:
    """Triton compiles some kernels for some architectures to one that does nothing."""
    for kernel in report["kernels"]:
        assert kernel["global_stores"] > 0, described(kernel)


FORWARD_BUDGET = {"registers": 168, "spill_bytes": 0, "local_accesses": 0, "shared_memory": 48 * 1024}


def over(kernels: list[dict[str, Any]], budget: dict[str, int]) -> list[tuple[str, str, int]]:
    """Kernel, quantity and value of everything beyond a budget."""
    return [
        (kernel["name"], quantity, kernel[quantity])
        for kernel in kernels
        for quantity, limit in budget.items()
        if kernel[quantity] > limit
    ]


def short_of_warps(kernels: list[dict[str, Any]], wanted: int) -> list[tuple[str, int]]:
    """Kernels of which an SM holds fewer warps, and how many."""
    return [(kernel["name"], kernel["resident_warps"]) for kernel in kernels if kernel["resident_warps"] < wanted]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_forward_keeps_its_budget(report: dict[str, Any], capability: int) -> None:
    kernels = compiled(report, per_step=False, capability=capability)
    assert not over(kernels, FORWARD_BUDGET)
    assert not short_of_warps(kernels, 12)


def test_forward_does_the_work_of_a_step_and_no_more(report: dict[str, Any]) -> None:
    for kernel in compiled(report, per_step=False):
        assert kernel["loops"] == 1, described(kernel)
        special = kernel["work"]["special"] - FORWARD_SPECIAL
        assert 0 <= special <= FEATURES_SPECIAL, described(kernel)
        blocks, remainder = divmod(kernel["work"]["multiply_adds"], BLOCK)
        assert blocks in BLOCKS, described(kernel)
        assert remainder == 0, described(kernel)


def test_forward_moves_little_more_than_the_floor(report: dict[str, Any]) -> None:
    for kernel in compiled(report, per_step=False):
        repeated = REPEATED_BYTES["identity" if "identity" in kernel["name"] else "log"]
        if "int8" in kernel["name"]:
            repeated += REPEATED_SCALES + READ_AGAIN * ("skip" in kernel["name"])
        beyond = kernel["work"]["global_bytes"] - kernel["floor_bytes"]
        assert 0 <= beyond <= repeated, described(kernel)


@pytest.mark.parametrize(("name", "target"), [("step, float32 state", 0.175), ("step, float16 state", 0.10)])
def test_predicted_time_of_the_forward(report: dict[str, Any], name: str, target: float) -> None:
    (kernel,) = [kernel for kernel in compiled(report, per_step=False, capability=90) if kernel["name"] == name]
    prediction = kernel["prediction"]
    assert prediction["floor"] == pytest.approx(kernel["floor_bytes"] / 4300)
    assert prediction["floor"] < prediction["nanoseconds"] <= target, described(kernel)


def test_nan_passes_through_the_forward(report: dict[str, Any]) -> None:
    """Every exponent is limited by a minimum, five per unit, which must let NaN pass; nothing else is a limit.

    But for int8: its 80 numbers are limited on both sides, by one instruction if the architecture has it.
    """
    for kernel in compiled(report, per_step=False):
        # Per thread: a tile has 64 coordinates, 128 threads.
        exponents, numbers = 5 * 40 * 64 // 128, 80 * 64 // 128 * ("int8" in kernel["name"])
        expected = {"propagating_minima": exponents + numbers}
        if numbers and kernel["capability"] < 90:
            expected["propagating_maxima"] = numbers
        found = {name: number for name, number in kernel["nan_handling"].items() if number}
        assert found == expected, described(kernel)


def test_int8_moves_nothing_between_threads_but_maxima(report: dict[str, Any]) -> None:
    """Three exchanges with neighbours for each of the 20 scales of a thread; numbers and scales stay where they are."""
    (wide,) = [kernel for kernel in compiled(report, per_step=False, capability=90) if kernel["name"] == FLOAT16]
    (narrow,) = [kernel for kernel in compiled(report, per_step=False, capability=90) if kernel["name"] == INT8]
    assert narrow["barriers"] == wide["barriers"]
    assert narrow["work"]["shared_bytes"] - wide["work"]["shared_bytes"] == 3 * 20 * 4 * 128 / 64


def test_nan_passes_through_the_backward(report: dict[str, Any]) -> None:
    """As in the forward, and again for the derivatives. Maxima only choose a scale, for which NaN must not count."""
    for kernel in compiled(report, per_step=True):
        handling = kernel["nan_handling"]
        assert handling["propagating_minima"] == 2 * 5 * 40 * 64 // 128, described(kernel)
        assert handling["swallowing_minima"] == 0, described(kernel)
        assert handling["propagating_maxima"] == 0, described(kernel)
        assert handling["saturations"] == 0, described(kernel)


# What the compiler of Triton 3.7.0 reaches, and up to a tenth more. The backward does not fit into registers.
BACKWARD_BUDGET = {
    80: {"registers": 255, "spill_bytes": 1000, "shared_memory": 88 * 1024},
    90: {"registers": 168, "spill_bytes": 1300, "shared_memory": 56 * 1024},
    120: {"registers": 255, "spill_bytes": 1050, "shared_memory": 88 * 1024},
}
BACKWARD_WARPS = {80: 4, 90: 12, 120: 4}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_backward_keeps_its_budget(report: dict[str, Any], capability: int) -> None:
    kernels = compiled(report, per_step=True, capability=capability)
    assert not over(kernels, BACKWARD_BUDGET[capability])
    assert not short_of_warps(kernels, BACKWARD_WARPS[capability])


def test_backward_does_the_work_of_a_step_and_no_more(report: dict[str, Any]) -> None:
    """Three loops over the steps: forward, back with layer 2, back with layer 1."""
    for kernel in compiled(report, per_step=True):
        assert kernel["loops"] == 3, described(kernel)
        special = kernel["work"]["special"] - BACKWARD_SPECIAL
        assert 0 <= special <= 2 * FEATURES_SPECIAL, described(kernel)


LISTING = """
	code for sm_90a
		Function : kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000e220000000800 */
        /*0010*/                   LDG.E.128 R20, desc[UR4][R2.64] ;   /* 0x0000002c02147981 */
        /*0020*/               @P0 EXIT ;                              /* 0x000000000000094d */
        /*0030*/                   MOV R3, R4 ;                        /* 0x000000000000094d */
        /*0040*/                   LDG.E.64 R12, desc[UR4][R8.64] ;    /* 0x000000000000094d */
        /*0050*/              @!P1 LDG.E.U16 R9, desc[UR4][R8.64] ;    /* 0x000000000000094d */
        /*0060*/                   HMMA.16816.F32 R4, R8, R12, R4 ;    /* 0x000000000000094d */
        /*0070*/                   MUFU.EX2 R4, R4 ;                   /* 0x000000000000094d */
        /*0080*/             @!UP1 UIADD3 UR4, UR4, 0x1, URZ ;         /* 0x000000000000094d */
        /*0090*/               @P2 BRA 0x180 ;                         /* 0x000000000000094d */
        /*00a0*/              @!P5 CALL.REL.NOINC 0xc0 ;               /* 0x000000000000094d */
        /*00b0*/                   BRA 0x60 ;                          /* 0x000000000000094d */
        /*00c0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;       /* 0x000000000000094d */
        /*00d0*/                   WARPGROUP.ARRIVE ;                  /* 0x000000000000094d */
        /*00e0*/                   HGMMA.64x16x16.F32 R76, R32, gdesc[UR48].tnspB, RZ, !UPT, gsb0 ;   /* 0x00 */
        /*00f0*/                   HGMMA.64x16x16.F32 R76, gdesc[UR8], R76, gsb0 ;                    /* 0x00 */
        /*0100*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;     /* 0x000000000000094d */
        /*0110*/                   LDSM.16.MT88.4 R8, [R2] ;           /* 0x000000000000094d */
        /*0120*/                   STL.64 [R1+0x10], R8 ;              /* 0x000000000000094d */
        /*0130*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;   /* 0x000000000000094d */
        /*0140*/                   STG.E desc[UR4][R8.64], R7 ;        /* 0x000000000000094d */
        /*0150*/                   BRA.U UP0, 0xc0 ;                   /* 0x000000000000094d */
        /*0160*/               @P3 BRA 0x30 ;                          /* 0x000000000000094d */
        /*0170*/                   EXIT ;                              /* 0x000000000000094d */
        /*0180*/                   STS.128 [R0], R4 ;                  /* 0x000000000000094d */
        /*0190*/                   BRA 0xa0 ;                          /* 0x000000000000094d */
        /*01a0*/                   BRA 0x1a0;                          /* 0x000000000000094d */
        /*01b0*/                   NOP;                                /* 0x000000000000094d */
"""


def test_reader_of_instructions() -> None:
    instructions = parse(LISTING)
    assert [entry.address for entry in instructions] == list(range(0, 0x1C0, 0x10))
    by_address = {entry.address: entry for entry in instructions}
    assert by_address[0x20].predicate == "P0"
    assert by_address[0x80].predicate == "!UP1"
    assert by_address[0x50].opcode == "LDG.E.U16"
    assert (by_address[0x40].predicate, by_address[0x40].operands) == ("", "R12, desc[UR4][R8.64]")
    assert {address: by_address[address].target for address in (0x90, 0xA0, 0x150, 0x1A0)} == {
        0x90: 0x180,
        0xA0: 0xC0,
        0x150: 0xC0,
        0x1A0: 0x1A0,
    }
    with pytest.raises(ValueError, match="no instructions"):
        parse("error: not a cubin")


def test_reader_of_loops() -> None:
    """Two loops in a third; code that lies behind the end belongs to the loop that jumps there and back."""
    program = Program(parse(LISTING))
    outer, first, second = program.loops
    assert (outer.header, first.header, second.header) == (0x30, 0x60, 0xC0)
    assert outer.addresses == {*range(0x30, 0x170, 0x10), 0x180, 0x190}
    assert first.addresses == {*range(0x60, 0xC0, 0x10), 0x180, 0x190}
    assert second.addresses == set(range(0xC0, 0x160, 0x10))
    assert program.innermost(outer) == [first, second]
    assert program.innermost(first) == []
    assert bodies(program) == [first, second]


def test_without_tensor_cores_inside_the_loop_over_tiles_counts() -> None:
    listing = re.sub(r"HG?MMA", "FFMA", LISTING)
    program = Program(parse(listing))
    assert [loop.header for loop in bodies(program)] == [0x30]
    straight = "\n".join(line for line in listing.splitlines() if "BRA" not in line and "CALL" not in line)
    with pytest.raises(ValueError, match="no loop"):
        bodies(Program(parse(straight)))


def test_counts() -> None:
    program = Program(parse(LISTING))
    _, first, second = program.loops
    assert count(program.inside(first)) == Counts(
        instructions=8, special=1, warp_multiply_adds=2048, shared_bytes=32 * 16
    )
    assert count(program.inside(second)) == Counts(
        instructions=10,
        group_multiply_adds=2 * 64 * 16 * 16,
        group_waits=1,
        group_shared_bytes=16 * 16 * 2 + (64 + 16) * 16 * 2,
        shared_bytes=32 * (16 + 4),
        global_bytes=32 * 4,
        local_bytes=32 * 8,
        global_stores=1,
        local_accesses=1,
        barriers=1,
    )
    assert count(program.instructions).global_bytes == 32 * (16 + 8 + 2 + 4)


@pytest.mark.parametrize(
    "opcode",
    [
        "HMMA.9999.F32",
        "HMMA.1688.F32.TF32",
        "HGMMA.64x8x8.F32.TF32",
        "QGMMA.64x16x32.F32.E4M3.E4M3",
        "IMMA.16832.S8.S8",
    ],
)
def test_unknown_matrix_instructions_are_not_counted_as_nothing(opcode: str) -> None:
    instructions = parse(LISTING.replace("HMMA.16816.F32", opcode))
    with pytest.raises(ValueError, match=re.escape(opcode)):
        count(instructions)


def test_unknown_jumps_are_not_ignored() -> None:
    with pytest.raises(ValueError, match="can't follow BRX at 0xb0"):
        _ = Program(parse(LISTING.replace("BRA 0x60 ", "BRX R2 -0x60 "))).loops


@pytest.mark.parametrize(
    ("capability", "registers", "shared_memory", "warps"),
    [
        (90, 32, 0, 64),
        (120, 32, 0, 48),
        (90, 128, 0, 16),
        (90, 129, 0, 12),
        (90, 168, 0, 12),
        (90, 169, 0, 8),
        (90, 255, 0, 8),
        (90, 32, 100 * 1024, 8),
        (80, 32, 81 * 1024, 8),
        (80, 32, 82 * 1024, 4),
        (120, 32, 48 * 1024, 8),
    ],
)
def test_resident_warps(capability: int, registers: int, shared_memory: int, warps: int) -> None:
    assert resident_warps(ARCHITECTURES[capability], registers, shared_memory, num_warps=4) == warps


def test_resident_programs_of_one_warp() -> None:
    assert resident_warps(ARCHITECTURES[90], registers=32, shared_memory=0, num_warps=1) == 32


IDLE = Work(*[0.0] * 11)


def test_prediction_by_hand() -> None:
    counts = Counts(
        instructions=1000,
        special=100,
        warp_multiply_adds=1000,
        group_multiply_adds=64_000,
        group_waits=10,
        group_shared_bytes=1600,
        shared_bytes=3200,
        global_bytes=1600,
        local_bytes=160,
        barriers=2,
    )
    work = work_of(counts, ARCHITECTURES[90], num_warps=4, warps=16, tile=64)
    assert work.instructions == 1000 * 4 / 64
    assert work.issue_clocks == 1000 / 64
    assert work.special == 100 * 32 * 4 / 64
    assert work.special_clocks == work.special / 16
    assert work.multiply_adds == 1000 * 4 / 64 + 1000
    assert work.tensor_clocks == pytest.approx(1000 * 4 / 64 / (0.62 * 2048) + 1000 / 2048)
    assert work.shared_bytes == 3200 * 4 / 64 + 1600 / 64
    assert work.global_bytes == 100
    assert work.local_bytes == 10
    assert work.load_store_clocks == (work.shared_bytes + 110) / 128
    assert work.latency_clocks == (1000 * 4 + 1200 + 2 * 30 + 10 * 24) / 256

    assert work + work == Work(*[2 * value for value in vars(work).values()])


def test_prediction_is_that_of_the_slowest_unit() -> None:
    memory = predict([IDLE], 652, H200)
    assert memory.floor == pytest.approx(652 / 4300)
    assert memory.nanoseconds == pytest.approx(memory.floor / ATTAINABLE["memory"])
    assert memory.limit == "memory"
    for field, limit, share in (
        ("issue_clocks", "issue", 0.7),
        ("special_clocks", "special", 0.9),
        ("tensor_clocks", "tensor", 0.8),
        ("load_store_clocks", "load/store", 0.75),
        ("latency_clocks", "latency", 1.0),
    ):
        busy = replace(IDLE, **{field: 80.0})
        for works, times in (([busy], 1), ([busy, replace(IDLE, issue_clocks=1.0), busy], 2)):
            prediction = predict(works, 652, H200)
            extra = (times - 1) * 1.0 / 0.7
            assert prediction.nanoseconds == pytest.approx((times * 80 / share + extra) / (132 * 1.98))
            assert prediction.limit == limit


def test_nan_handling_is_read_from_ptx() -> None:
    ptx = """
	min.NaN.f32 	%f1, %f2, %f3;
	min.ftz.NaN.f32 	%f1, %f2, %f3;
	min.f32 	%f1, %f2, 0f41F00000;
	min.ftz.xorsign.abs.f32 	%f1, %f2, %f3;
	min.s32 	%r1, %r2, %r3;
	max.NaN.f16x2 	%r1, %r2, %r3;
	max.bf16 	%rs1, %rs2, %rs3;
	max.u64 	%rd1, %rd2, %rd3;
	fma.rn.ftz.sat.f32 	%f1, %f2, %f3, %f4;
	cvt.sat.f32.f32 	%f1, %f2;
	cvt.rn.satfinite.e4m3x2.f32 	%rs1, %f2, %f3;
"""
    assert nan_handling(ptx) == NanHandling(
        propagating_minima=2, swallowing_minima=2, propagating_maxima=1, swallowing_maxima=1, saturations=2
    )


def error_of(*args: str) -> str:
    """The one line that the command, failing as expected, prints."""
    result = CliRunner().invoke(app, ["kernels", *args])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_command_refuses_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in error_of()


def test_command_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'l2l_fast[triton]'" in error_of()


def test_command_without_a_disassembler(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(knobs.NvidiaTool, "from_path", lambda path: None)
    assert "TRITON_CUOBJDUMP_PATH" in error_of()


def test_command_checks_its_output_before_any_work(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    assert "can't write" in error_of("--json", str(blocked / "kernels.json"))

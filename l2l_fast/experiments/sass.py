"""Reading machine code: instructions, loops and what they occupy, from a disassembly of NVIDIA's ``cuobjdump``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

LANES = 32

# "/*0f40*/  @!P0 LDG.E.128 R24, desc[UR44][R114.64] ;": cuobjdump puts every instruction on a line of its own.
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
_TARGET = re.compile(r"\b0x([0-9a-f]+)$")
_WARPGROUP_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")

# Multiply-adds of a warp in one mma.sync of 16-bit operands: the digits are m, n and k of its shape.
_WARP_SHAPES = {"1688": 16 * 8 * 8, "16816": 16 * 8 * 16}
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_MATRICES = {"2": 2, "4": 4}

_GLOBAL = ("LDG", "STG")
_LOCAL = ("LDL", "STL")
_SHARED = ("LDS", "STS")
_SHARED_MATRICES = ("LDSM", "STSM")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp.

    Attributes:
        address: in bytes from the start of the kernel.
        predicate: ``"P0"``, ``"!UP1"``, ...; empty where the instruction always takes effect.
        opcode: with its modifiers, as in ``"LDG.E.128"``.
        operands: the rest of the line.
    """

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def root(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        """What follows the opcode, dot by dot."""
        return self.opcode.split(".")[1:]

    @property
    def target(self) -> int | None:
        """Address that a branch or call names."""
        found = _TARGET.search(self.operands)
        return int(found[1], 16) if found else None

    @property
    def bytes_per_lane(self) -> int:
        """Bytes that a lane moves, for loads and stores."""
        if self.root in _SHARED_MATRICES:  # an 8 x 8 matrix of 16 bits is 4 bytes of every lane
            return 4 * next((_MATRICES[modifier] for modifier in self.modifiers if modifier in _MATRICES), 1)
        return next((_WIDTHS[modifier] for modifier in self.modifiers if modifier in _WIDTHS), 4)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds in the tensor core, by the four warps of a warpgroup together for ``HGMMA``.

        Raises:
            ValueError: for a matrix instruction of an unknown shape, or of operands that are not 16 bits wide.
        """
        if not self.root.endswith("MMA"):
            return 0
        if self.root == "HGMMA" and (shape := _WARPGROUP_SHAPE.match(self.opcode)) and "TF32" not in self.modifiers:
            m, n, k = map(int, shape.groups())
            return m * n * k
        if self.root == "HMMA" and self.modifiers[0] in _WARP_SHAPES and "TF32" not in self.modifiers:
            return _WARP_SHAPES[self.modifiers[0]]
        raise ValueError(f"unknown matrix instruction {self.opcode}; teach it to {__name__}")


def parse(listing: str) -> list[Instruction]:
    """Instructions of a disassembly of one kernel, in the order of their addresses.

    Raises:
        ValueError: if there are none.
    """
    found = [
        Instruction(int(address, 16), predicate or "", opcode, operands)
        for address, predicate, opcode, operands in _INSTRUCTION.findall(listing)
    ]
    if not found:
        raise ValueError(f"no instructions in the disassembly, which starts with {listing[:80]!r}")
    return found


@dataclass(frozen=True)
class Loop:
    """A natural loop.

    Attributes:
        header: address of the first instruction of an iteration.
        addresses: of all instructions that an iteration may reach, those of inner loops included.
    """

    header: int
    addresses: frozenset[int]


class Program:
    """Instructions of a kernel and the loops they form."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = list(instructions)

    @cached_property
    def loops(self) -> list[Loop]:
        """Loops in the order of their headers; endless empty ones, which pad the end of a kernel, are left out."""
        blocks, successors = self._blocks()
        predecessors: dict[int, set[int]] = {start: set() for start in blocks}
        for start, targets in successors.items():
            for target in targets:
                predecessors[target].add(start)
        dominators = _dominators(self.instructions[0].address, successors, predecessors)
        bodies: dict[int, set[int]] = {}
        for start, targets in successors.items():
            for header in targets:
                if start in dominators and header in dominators[start]:
                    bodies.setdefault(header, set()).update(_reaching(start, header, predecessors))
        loops = []
        for header, body in sorted(bodies.items()):
            addresses = frozenset(entry.address for start in body for entry in blocks[start])
            if len(addresses) > 1:
                loops.append(Loop(header, addresses))
        return loops

    def inside(self, loop: Loop) -> list[Instruction]:
        """Instructions of a loop."""
        return [entry for entry in self.instructions if entry.address in loop.addresses]

    def innermost(self, loop: Loop) -> list[Loop]:
        """Loops inside ``loop`` that contain no other; empty if it contains none itself."""
        inner = [other for other in self.loops if other.addresses < loop.addresses]
        return [one for one in inner if not any(other.addresses < one.addresses for other in inner)]

    def _blocks(self) -> tuple[dict[int, list[Instruction]], dict[int, set[int]]]:
        """Basic blocks by the address of their first instruction, and the blocks that follow each."""
        known = {entry.address for entry in self.instructions}
        starts = {self.instructions[0].address}
        for entry, following in pairwise(self.instructions):
            if entry.root in ("BRX", "JMP", "JMX"):
                raise ValueError(f"can't follow {entry.opcode} at {entry.address:#x}; teach it to {__name__}")
            if entry.root in ("BRA", "CALL", "EXIT", "RET"):
                starts |= {following.address} | _jumps(entry, known)
        blocks: dict[int, list[Instruction]] = {}
        start = self.instructions[0].address
        for entry in self.instructions:
            if entry.address in starts:
                start = entry.address
            blocks.setdefault(start, []).append(entry)
        successors = {start: _jumps(block[-1], known) for start, block in blocks.items()}
        for start, next_start in pairwise(blocks):
            if _falls_through(blocks[start][-1]):
                successors[start].add(next_start)
        return blocks, successors


def _jumps(entry: Instruction, known: set[int]) -> set[int]:
    """Where an instruction may go other than to the next one."""
    # The assembler also writes some plain jumps as calls, so a call counts as one.
    return {entry.target} & known if entry.root in ("BRA", "CALL") and entry.target is not None else set()


def _falls_through(last: Instruction) -> bool:
    """Whether the next instruction may follow."""
    if last.predicate or last.root not in ("BRA", "EXIT", "RET"):
        return True
    # "BRA.U !UP0, 0x..." has its condition among the operands.
    return last.root == "BRA" and "," in last.operands


def _dominators(entry: int, successors: dict[int, set[int]], predecessors: dict[int, set[int]]) -> dict[int, set[int]]:
    """For every block that can be reached, the blocks through which every path to it leads."""
    reachable, pending = {entry}, [entry]
    while pending:
        for target in successors[pending.pop()] - reachable:
            reachable.add(target)
            pending.append(target)
    dominators = {start: set(reachable) for start in reachable}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for start in reachable - {entry}:
            common = set.intersection(*(dominators[before] for before in predecessors[start] & reachable)) | {start}
            if common != dominators[start]:
                dominators[start], changed = common, True
    return dominators


def _reaching(last: int, header: int, predecessors: dict[int, set[int]]) -> set[int]:
    """Blocks from which ``last`` is reached without passing ``header``, and the two themselves."""
    body, pending = {header, last}, [last]
    while pending:
        start = pending.pop()
        if start != header:
            new = predecessors[start] - body
            body |= new
            pending += new
    return body


@dataclass(frozen=True)
class Counts:
    """What a stretch of machine code occupies when each instruction is issued once by every warp.

    Bytes count every lane, those switched off by a predicate and those that load what a neighbour loads as well:
    they are what the load/store unit handles.

    Attributes:
        instructions: issued by a warp.
        special: special-function instructions (exponential, reciprocal, ...) issued by a warp.
        warp_multiply_adds: in the tensor cores, by a warp (``mma.sync``).
        group_multiply_adds: in the tensor cores, by four warps together (``wgmma``).
        group_waits: waits for the tensor core to finish what a warpgroup started.
        group_shared_bytes: operands that the tensor core reads from shared memory for four warps together.
        shared_bytes: of a warp, through shared memory; shuffles between lanes, which take the same way, included.
        global_bytes: of a warp, to and from global memory.
        local_bytes: of a warp, to and from local memory: registers that did not fit.
        global_stores: store instructions to global memory.
        local_accesses: instructions that access local memory.
        barriers: synchronisations of all warps of a program.
    """

    instructions: int = 0
    special: int = 0
    warp_multiply_adds: int = 0
    group_multiply_adds: int = 0
    group_waits: int = 0
    group_shared_bytes: int = 0
    shared_bytes: int = 0
    global_bytes: int = 0
    local_bytes: int = 0
    global_stores: int = 0
    local_accesses: int = 0
    barriers: int = 0


def count(instructions: Iterable[Instruction]) -> Counts:
    """What ``instructions`` occupy, each issued once."""
    totals = dict.fromkeys(Counts.__dataclass_fields__, 0)
    for entry in instructions:
        root, moved = entry.root, LANES * entry.bytes_per_lane
        totals["instructions"] += 1
        totals["special"] += root == "MUFU"
        totals["barriers"] += root == "BAR"
        totals["group_waits"] += entry.opcode.startswith("WARPGROUP.DEPBAR")
        totals["group_multiply_adds" if root == "HGMMA" else "warp_multiply_adds"] += entry.multiply_adds
        totals["group_shared_bytes"] += _operand_bytes(entry)
        totals["global_stores"] += root == "STG"
        totals["local_accesses"] += root in _LOCAL
        totals["global_bytes"] += moved * (root in (*_GLOBAL, "LDGSTS"))
        totals["local_bytes"] += moved * (root in _LOCAL)
        totals["shared_bytes"] += moved * (root in (*_SHARED, *_SHARED_MATRICES, "LDGSTS", "SHFL"))
    return Counts(**totals)


def _operand_bytes(entry: Instruction) -> int:
    """Bytes that ``wgmma`` on 16-bit operands reads from shared memory: B always, A unless it is in registers."""
    shape = _WARPGROUP_SHAPE.match(entry.opcode)
    if shape is None:
        return 0
    m, n, k = map(int, shape.groups())
    a_in_registers = not entry.operands.split(",")[1].strip().startswith("gdesc")
    return 2 * k * (n if a_in_registers else m + n)

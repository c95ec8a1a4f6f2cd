"""Machine code as a graph of instructions: loops, the usual path through them, and what lies on it.

Two languages: NVIDIA's SASS as nvdisasm prints it, and AMD's assembly as LLVM does. Counts are instructions
of a warp (a wave, on AMD).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction; `target` is the index that a branch jumps to."""

    opcode: str
    target: int | None = None
    falls_through: bool = True
    leaves: bool = False  # ends the kernel, for a thread whose predicate holds

    @property
    def is_exp2(self) -> bool:
        return self.opcode.startswith(("MUFU.EX2", "v_exp_f32"))

    def bits(self, access: str) -> int:
        """Width of a global "load" or "store" for one thread, 0 of any other instruction."""
        sass, gcn = ("LDG", "_load_") if access == "load" else ("STG", "_store_")
        if self.opcode.startswith(sass):
            found = re.search(r"\.(?:U|S)?(8|16|64|128)\b", self.opcode)
            return int(found[1]) if found else 32
        if self.opcode.startswith(("global_", "buffer_", "flat_")) and gcn in self.opcode:
            for name, width in (("dwordx4", 128), ("dwordx3", 96), ("dwordx2", 64), ("dword", 32)):
                if name in self.opcode:
                    return width
            return 8 if "byte" in self.opcode else 16
        return 0


Path = list[Instruction]


def parse_sass(lines: Iterable[str]) -> Path:
    """Instructions of one kernel from nvdisasm's lines."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1].strip())
    path = []
    for text in code:
        always = not text.startswith("@")
        opcode = text.split()[0 if always else 1]
        # ptxas also leaves loops by a predicated CALL to a label of the same function.
        branch = re.search(r"\b(?:BRA|CALL)\b.*?(\.L_x_\d+)", text)
        stops = opcode.startswith(("EXIT", "RET", "BRA")) and always and ", " not in text
        target = labels.get(branch[1]) if branch else None
        path.append(Instruction(opcode, target, not stops, opcode.startswith("EXIT")))
    return path


def parse_gcn(lines: Iterable[str]) -> Path:
    """Instructions of one kernel from LLVM's assembly for AMD."""
    labels: dict[str, int] = {}
    code: list[list[str]] = []
    for line in lines:
        text = line.partition(";")[0].strip()
        if label := re.match(r"(\.LBB\d+_\d+):", text):
            labels[label[1]] = len(code)
        elif re.match(r"(v|s|ds|global|buffer|flat|scratch)_\w", text):
            code.append(text.split())
    path = []
    for opcode, *operands in code:
        target = labels.get(operands[0]) if opcode.startswith(("s_branch", "s_cbranch")) else None
        leaves = opcode == "s_endpgm"
        falls_through = opcode not in ("s_branch", "s_cbranch_execnz") and not leaves
        # A jump over code that no lane has to run is rare: the usual lanes are inside the row.
        target = None if opcode == "s_cbranch_execz" else target
        path.append(Instruction(opcode, target, falls_through, leaves))
    return path


def _shortest(code: Sequence[Instruction], start: int, ends: set[int], low: int, high: int) -> list[int]:
    """Indices from start to the nearest of ends within [low, high]: the way when no rare branch is taken."""
    came_from = {start: start}
    frontier = [start]
    while frontier:
        following = []
        for at in frontier:
            if at in ends:
                way = [at]
                while way[-1] != start:
                    way.append(came_from[way[-1]])
                return way[::-1]
            here = code[at]
            for step in ([at + 1] if here.falls_through else []) + (
                [here.target] if here.target is not None else []
            ):
                if low <= step <= high and step not in came_from:
                    came_from[step] = at
                    following.append(step)
        frontier = following
    return []


def _loops(code: Sequence[Instruction]) -> Iterator[list[list[int]]]:
    """The usual path of every cycle, those that overlap in one group, in the order of the code.

    A compiler may lay a loop's blocks out in any order and give it several backward branches, one of them on
    a rare path.
    """
    edges = sorted(
        (here.target, at) for at, here in enumerate(code) if here.target is not None and here.target < at
    )
    group: list[list[int]] = []
    reach = -1
    for start, end in edges:
        if group and start > reach:
            yield group
            group = []
        if way := _shortest(code, start, {end}, start, end):
            group.append(way)
            reach = max(reach, end)
    if group:
        yield group


def _has_exp2(code: Sequence[Instruction], way: Iterable[int]) -> bool:
    return any(code[at].is_exp2 for at in way)


def main_loops(code: Path, loops: Sequence[int] = (0,)) -> list[Path]:
    """The usual path through each of the loops asked for.

    `loops` counts the loops that load and exponentiate, in the order of the code. A kernel without any is its
    own loop, from its first instruction to the nearest end.
    """

    def works(way: list[int]) -> bool:
        return _has_exp2(code, way) and any(code[at].bits("load") for at in way)

    groups = ([way for way in group if works(way)] for group in _loops(code))
    if hot := [min(ways, key=len) for ways in groups if ways]:
        return [[code[at] for at in hot[which]] for which in loops]
    # Not the way of a row that is masked out.
    exits = {at for at, here in enumerate(code) if here.leaves}
    ways = [_shortest(code, 0, {end}, 0, len(code)) for end in exits]
    ways = [way for way in ways if _has_exp2(code, way)] or [_through_exp2(code, exits)]
    return [[code[at] for at in min(ways, key=len)]]


def _through_exp2(code: Path, exits: set[int]) -> list[int]:
    """The shortest way that meets an exponential, where all ends share an exit with masked-out rows."""
    ways = []
    for at, here in enumerate(code):
        if here.is_exp2:
            before = _shortest(code, 0, {at}, 0, len(code))
            after = _shortest(code, at, exits, 0, len(code))
            if before and after:
                ways.append(before + after[1:])
    return min(ways, key=len, default=list(range(len(code))))


@dataclass(frozen=True)
class Mix:
    """What lies on a path: counts, and the width in bits of the accesses that carry most of its bits."""

    instructions: int
    ex2: int
    load_bits: int
    store_bits: int


def mix(path: Path) -> Mix:
    exp2 = sum(here.is_exp2 for here in path)
    return Mix(len(path), exp2, _main_width(path, "load"), _main_width(path, "store"))


def _main_width(path: Path, access: str) -> int:
    """Not the widest: a few row statistics in 32 bits must not hide that logits come 16 bits at a time."""
    count = Counter(here.bits(access) for here in path)
    return max(count, key=lambda width: width * count[width], default=0)

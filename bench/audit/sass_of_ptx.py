"""Machine instructions executed, from the PTX instructions executed.

ptxas keeps line numbers through its optimisations. Given PTX whose source is itself, nvdisasm says of every
machine instruction from which line of PTX it was made, and that line's executions are the instruction's.
ptxas also moves instructions out of loops, and into blocks where a predicate stands in for a branch; what a
block executes in common is what most of its instructions say.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median_high

from .compiled import tool

# Of the sections behind the code nothing is needed, and they name labels that are gone.
_DEBUG = re.compile(r"^\s*\.section\s+\.debug_.*", re.MULTILINE | re.DOTALL)
_DIRECTIVES = re.compile(r"^\s*\.(?:loc|file)\b.*$", re.MULTILINE)
_ENDS_BLOCK = ("BRA", "BRX", "JMP", "EXIT", "RET", "CALL", "BSYNC", "BREAK")


def numbered(ptx: str) -> str:
    """The module with every instruction's own line as its source."""
    lines = _DIRECTIVES.sub("", _DEBUG.sub("", ptx)).split("\n")
    inside, made = False, []
    for number, line in enumerate(lines, 1):
        if inside and re.match(r"[@{a-z]", line.strip()):
            made.append(f".loc 1 {number} 0")
        made.append(line)
        inside = (inside or line.startswith("{")) and not line.startswith("}")
    return "\n".join([*made, '.file 1 "kernel.ptx"', ""])


def blocks(disassembly: str) -> list[list[tuple[int, str]]]:
    """Lines of PTX and opcodes of every basic block; line 0 where ptxas made an instruction of none."""
    found: list[list[tuple[int, str]]] = [[]]
    line = 0
    for row in disassembly.splitlines():
        if place := re.search(r'//## File "[^"]*kernel\.ptx", line (\d+)', row):
            line = int(place[1])
        elif row.startswith(".L_x_"):
            line = 0
            found.append([])
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", row):
            found[-1].append((line, instruction[1]))
            if instruction[1].startswith(_ENDS_BLOCK):
                found.append([])
    return [block for block in found if block]


def disassembled(ptx: str) -> str:
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if target is None:
        raise ValueError("PTX without a .target")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(numbered(ptx))
        for command in (
            [tool("ptxas"), "-lineinfo", f"--gpu-name={target[1]}", str(source), "-o", str(cubin)],
            [tool("nvdisasm"), "-c", "-g", str(cubin)],
        ):
            done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


def executed_instructions(found: list[list[tuple[int, str]]], executions: Mapping[int, int]) -> int:
    """By all warps, given how often they executed each line of PTX."""
    return sum(len(block) * _executions(block, executions) for block in found)


def _executions(block: list[tuple[int, str]], executions: Mapping[int, int]) -> int:
    known = [executions.get(line, 0) for line, _ in block if line]
    return median_high(known) if known else 0

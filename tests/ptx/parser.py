"""The text of a PTX module as a list of statements."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

# The version of the instruction set that the executor was tried with.
ISA_VERSION = "8.7"


class Unsupported(Exception):
    """PTX that the executor does not know: its message names the instruction and its line."""


class Parameter(NamedTuple):
    kind: str
    name: str


@dataclass
class Statement:
    line: int
    name: str
    guard: str | None
    negated: bool
    operands: list[str]


@dataclass
class Kernel:
    """The one entry of a module; labels say before which statement they stand."""

    name: str
    parameters: list[Parameter]
    warps: int
    register_types: dict[str, str]
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\((.*?)\)(.*?)\n\{(.*?)\n\}", re.DOTALL)
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$")
# Triton writes `{ .reg .b16 tmp; mov.b32 {tmp, %rs1}, %r2; }` where half of a register is not needed.
_INLINE = re.compile(r"\{\s*\.reg\s+\.\w+\s+tmp;\s*(.*)\}$")


def parse(ptx: str) -> Kernel:
    version = re.search(r"^\.version (\S+)", ptx, re.MULTILINE)
    if version is None or version[1] != ISA_VERSION:
        raise Unsupported(f"PTX of version {version and version[1]}; the executor knows {ISA_VERSION}")
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise Unsupported("a module without an .entry")
    name, parameters, directives, body = entry.groups()
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", directives)
    if threads is None or int(threads[1]) % 32:
        raise Unsupported(f"{name}: directives {directives.split()}")
    kernel = Kernel(
        name,
        [
            Parameter(*x)
            for x in re.findall(r"\.param\s+\.(\w+)[^,\n]*?(\w+)\s*(?:,|$)", parameters, re.MULTILINE)
        ],
        int(threads[1]) // 32,
        {prefix: kind for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+%(\w+)<\d+>", body)},
    )
    first = ptx[: entry.start(4)].count("\n") + 1
    for n, line in enumerate(body.split("\n"), first):
        _add(kernel, n, line.split("//")[0].strip())
    return kernel


def _add(kernel: Kernel, n: int, line: str) -> None:
    if label := re.match(r"([$\w]+):$", line):
        kernel.labels[label[1]] = len(kernel.statements)
        return
    if line in ("", "{", "}") or line[0] == ".":
        return
    if inline := _INLINE.match(line):
        line = re.sub(r"\btmp\b", "_", inline[1])
    for statement in filter(None, map(str.strip, line.split(";"))):
        found = _STATEMENT.match(statement)
        if found is None:
            raise Unsupported(f"PTX line {n}: {statement}")
        operands = _operands(found[4])
        kernel.statements.append(Statement(n, found[3], found[2], found[1] == "!", operands))


def _operands(text: str) -> list[str]:
    """Split at commas, with {…} and […] whole."""
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if x.strip()]

"""What launches executed, by class of instruction and by kind of memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .driver import Launch
from .parser import Statement

_EXCHANGES = ("shfl", "redux", "vote")
_APPROXIMATE = ("ex2", "lg2", "rcp", "div", "sqrt")


def class_of(statement: Statement) -> str:
    """The class of an instruction, as a GPU's units divide them."""
    parts = statement.name.split(".")
    head, kind = parts[0], parts[-1]
    if head in ("ld", "st", "atom", "red"):
        space = "parameter" if "param" in parts else "shared" if "shared" in parts else "global"
        return f"{space} {'atomic' if head in ('atom', 'red') else 'load' if head == 'ld' else 'store'}"
    if head in ("ldmatrix", "stmatrix"):
        return "shared load" if head == "ldmatrix" else "shared store"
    if head in ("bar", "barrier"):
        return "barrier"
    if head in _EXCHANGES:
        return "exchange"
    if head in ("bra", "ret", "exit", "trap"):
        return "branch"
    if head in ("setp", "selp"):
        return "comparison and choice"
    if head == "mov":
        return "move"
    if "f64" in parts:
        return "float64"
    if head == "cvt":
        return "conversion"
    if head in _APPROXIMATE and kind == "f32":
        return "approximation"
    return "float32" if kind in ("f32", "bf16x2", "f16x2", "bf16", "f16") else "integer"


def access_of(statement: Statement) -> tuple[str, int] | None:
    """Class and bits of one lane's access, of global and shared memory."""
    name = class_of(statement)
    if not name.startswith(("global", "shared")):
        return None
    parts = statement.name.split(".")
    if "matrix" in parts[0]:
        return name, 32 * next(int(x[1:]) for x in parts if x in ("x1", "x2", "x4"))
    vector = next((int(x[1:]) for x in parts if x in ("v2", "v4")), 1)
    return name, vector * int(parts[-1][1:])


@dataclass
class Counts:
    """Of launches, by all their warps.

    Attributes:
        instructions: of PTX, by class.
        bytes: moved by all lanes, by class and bits of a lane's access.
        loaded, stored: bytes of the tensors, each byte as often as it was; `distinct_...` each once.
        lines: executions of each line of the (last) program's PTX.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    bytes: Counter[tuple[str, int]] = field(default_factory=Counter)
    loaded: int = 0
    stored: int = 0
    distinct_loaded: int = 0
    distinct_stored: int = 0
    lines: Counter[int] = field(default_factory=Counter)

    @property
    def reads(self) -> float:
        """How often a byte that was read was read."""
        return self.loaded / max(self.distinct_loaded, 1)


def counts(launches: Sequence[Launch]) -> Counts:
    found = Counts()
    for launch in launches:
        report = launch.report
        rows = zip(launch.program.statements, report.warps.tolist(), report.lanes.tolist(), strict=True)
        for statement, warps, lanes in rows:
            found.instructions[class_of(statement)] += warps
            found.lines[statement.line] += warps
            if access := access_of(statement):
                found.bytes[access] += lanes * access[1] // 8
        loaded, stored, distinct_loaded, distinct_stored = report.traffic.sum(0).tolist()
        found.loaded += loaded
        found.stored += stored
        found.distinct_loaded += distinct_loaded
        found.distinct_stored += distinct_stored
    return found

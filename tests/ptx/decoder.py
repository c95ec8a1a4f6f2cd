"""Statements as the core's instructions: opcodes by number, registers by their place in a warp's memory."""

from __future__ import annotations

import ctypes
import re

from .operations import LANEWISE, OPCODES, width
from .parser import Kernel, Statement, Unsupported

RELEASE, ACQUIRE = 1, 2
_ORDERS = {"relaxed": 0, "release": RELEASE, "acquire": ACQUIRE, "acq_rel": RELEASE | ACQUIRE}
_LANES = 32
SPECIAL = ("tid.x", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x")
_REGISTER_BYTES = {"pred": 4, "b16": 4, "b32": 4, "b64": 8}
# Hints to a cache, which orders and results do not depend on.
_CACHE_HINTS = {
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_first", "L1::evict_last", "L1::no_allocate"),
    *("L1::evict_normal", "L1::evict_unchanged", "L2::evict_first", "L2::evict_last", "L2::cache_hint"),
}
_ACCESS_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}


class Instruction(ctypes.Structure):
    """core/program.h describes it."""

    _fields_ = [
        ("opcode", ctypes.c_int32), ("guard", ctypes.c_int32),
        ("negated", ctypes.c_int32), ("count", ctypes.c_int32),
        ("destination", ctypes.c_int32 * 4), ("source", ctypes.c_int32 * 4), ("immediate", ctypes.c_int64),
        ("line", ctypes.c_int32), ("width", ctypes.c_int32),
    ]  # fmt: skip


class Registers:
    """Where registers, constants and parameters lie."""

    def __init__(self, types: dict[str, str]) -> None:
        self.types = types
        self.places: dict[str, int] = {}
        self.bytes = 0
        self.constants: dict[int, tuple[int, int]] = {}  # by place: value, and bytes of a lane

    def place(self, name: str, bytes_: int) -> int:
        if name not in self.places:
            self.places[name] = self.bytes
            self.bytes += _LANES * bytes_
        return self.places[name]

    def width(self, name: str) -> int:
        kind = re.match(r"%([a-z]+)\d+$", name)
        if kind is None or kind[1] not in self.types:
            raise Unsupported(f"register {name}")
        return _REGISTER_BYTES[self.types[kind[1]]]

    def register(self, name: str) -> int:
        return -1 if name == "_" else self.place(name, self.width(name))

    def source(self, text: str, bytes_: int) -> int:
        """A register, or what stands for a special one or a constant."""
        if text[0] == "%":
            return self.place(text[1:], 4) if text[1:] in SPECIAL else self.register(text)
        value = _constant(text) & ((1 << 8 * bytes_) - 1)
        place = self.place(f"constant {value} {bytes_}", bytes_)
        self.constants[place] = (value, bytes_)
        return place


def _constant(text: str) -> int:
    if text == "WARP_SZ":
        return _LANES
    if re.match(r"0[fF][0-9A-Fa-f]{8}$|0[dD][0-9A-Fa-f]{16}$", text):
        return int(text[2:], 16)
    if re.match(r"-?(0x[0-9A-Fa-f]+|\d+)U?$", text):
        return int(text.rstrip("U"), 0)
    if re.match(r"[a-zA-Z_$][\w$]*$", text):
        return 0  # the block's shared array, the only symbol there is
    raise Unsupported(f"operand {text}")


class Decoder:
    """Decodes a kernel's statements, one or two instructions each, into `code`."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.registers = Registers(kernel.register_types)
        for name in SPECIAL:
            self.registers.place(name, 4)
        self.code: list[Instruction] = []
        self.statements: list[Statement] = []  # that of each instruction
        self.begins: list[int] = []  # the first instruction of each statement
        for statement in kernel.statements:
            self.begins.append(len(self.code))
            try:
                self._decode(statement)
            except Unsupported as error:
                text = f"{statement.name} {', '.join(statement.operands)}"
                raise Unsupported(f"PTX line {statement.line}: {text}: {error}") from None
        self.begins.append(len(self.code))
        self._emit("TRAP", Statement(0, "trap", None, False, []))
        self._place_targets()

    def _emit(self, opcode: str, statement: Statement) -> Instruction:
        guard = -1 if statement.guard is None else self.registers.register(statement.guard)
        none = (ctypes.c_int32 * 4)(-1, -1, -1, -1)
        made = Instruction(OPCODES[opcode], guard, statement.negated, 0, none, none, 0, statement.line, 0)
        self.code.append(made)
        self.statements.append(statement)
        return made

    def _place_targets(self) -> None:
        for made, statement in zip(self.code, self.statements, strict=True):
            if made.opcode == OPCODES["BRANCH"]:
                made.immediate = self.begins[self.kernel.labels[statement.operands[0]]]

    def _decode(self, statement: Statement) -> None:
        parts = statement.name.split(".")
        decode = {
            "bra": self._control, "ret": self._control, "exit": self._control, "trap": self._control,
            "bar": self._control, "barrier": self._control, "ld": self._access, "st": self._access,
            "atom": self._atomic, "red": self._atomic, "shfl": self._shuffle, "redux": self._reduction,
            "vote": self._vote, "ldmatrix": self._matrix, "stmatrix": self._matrix,
        }.get(parts[0])  # fmt: skip
        if decode:
            decode(statement, parts)
        elif statement.name.startswith("mov.b") and "{" in "".join(statement.operands):
            self._pack(statement, parts)
        elif statement.name.startswith("setp.") and parts[-1] in ("bf16x2", "f16x2"):
            self._packed_comparison(statement)
        elif statement.name in LANEWISE:
            self._lanewise(statement.name, statement, statement.operands)
        else:
            raise Unsupported("the executor does not know this instruction")

    def _lanewise(self, name: str, statement: Statement, operands: list[str]) -> None:
        sources = LANEWISE[name].sources
        if len(operands) != 1 + len(sources):
            raise Unsupported(f"{len(sources)} sources were expected")
        made = self._emit(name, statement)
        made.destination[0] = self.registers.register(operands[0])
        for n, (kind, text) in enumerate(zip(sources, operands[1:], strict=True)):
            made.source[n] = self.registers.source(text, width(kind))

    def _packed_comparison(self, statement: Statement) -> None:
        predicates, *sources = statement.operands
        for half, predicate in zip(("low", "high"), predicates.split("|"), strict=True):
            if predicate != "_":
                self._lanewise(f"{statement.name}.{half}", statement, [predicate, *sources])

    def _control(self, statement: Statement, parts: list[str]) -> None:
        opcodes = {
            "bra": "BRANCH", "bra.uni": "BRANCH", "ret": "RETURN", "exit": "RETURN", "trap": "TRAP",
            "bar.sync": "BARRIER", "barrier.sync": "BARRIER", "bar.warp.sync": "WARP_BARRIER",
        }  # fmt: skip
        opcode = opcodes.get(statement.name)
        if opcode is None:
            raise Unsupported("the executor does not know this instruction")
        if opcode == "BARRIER" and statement.operands != ["0"]:
            raise Unsupported("only barrier 0 of all threads is modelled")
        made = self._emit(opcode, statement)
        if opcode == "WARP_BARRIER":
            made.source[3] = self.registers.source(statement.operands[0], 4)

    def _pack(self, statement: Statement, parts: list[str]) -> None:
        to, of = statement.operands
        whole = int(parts[1][1:]) // 8
        opcode = "UNPACK" if to[0] == "{" else "PACK"
        registers = _group(to if opcode == "UNPACK" else of)
        made = self._emit(opcode, statement)
        made.count, made.width = len(registers), whole // len(registers)
        if opcode == "UNPACK":
            made.source[0] = self.registers.source(of, max(whole, 4))
            made.destination[: made.count] = [self.registers.register(x) for x in registers]
        else:
            made.destination[0] = self.registers.register(to)
            made.source[: made.count] = [self.registers.source(x, 4) for x in registers]

    def _address(self, made: Instruction, text: str, bytes_: int) -> None:
        found = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]$", text)
        if found is None:
            raise Unsupported(f"address {text}")
        made.source[0] = self.registers.source(found[1], bytes_)
        made.immediate = int(found[2] or 0)

    def _access(self, statement: Statement, parts: list[str]) -> None:
        load, space = parts[0] == "ld", parts[1]
        if space == "param":
            return self._parameter(statement, parts)
        if space not in ("global", "shared"):
            raise Unsupported(f"memory of kind {space}")
        if "acquire" in parts or "relaxed" in parts:
            return self._atomic_load(statement, parts)
        vector = [int(x[1:]) for x in parts[2:-1] if re.match(r"v\d$", x)]
        unknown = [x for x in parts[2:-1] if x not in _CACHE_HINTS and not re.match(r"v\d$", x)]
        bytes_ = _ACCESS_BYTES.get(parts[-1][1:])
        if unknown or bytes_ is None or (load and parts[-1][0] == "s"):
            raise Unsupported(f"an access with {', '.join(unknown) or parts[-1]}")
        # A cache policy may follow.
        text, address = statement.operands[:2] if load else statement.operands[1::-1]
        registers = _group(text)
        if len(registers) != (vector[0] if vector else 1) or len(registers) > 4:
            raise Unsupported(f"{len(registers)} registers")
        if load and bytes_ < 8 and any(x != "_" and self.registers.width(x) == 8 for x in registers):
            raise Unsupported("a load that extends what it loads")
        made = self._emit(f"{space}_{'load' if load else 'store'}".upper(), statement)
        self._address(made, address, 8 if space == "global" else 4)
        made.count, made.width = len(registers), bytes_
        for n, register in enumerate(registers):
            place = (
                self.registers.register(register) if load else self.registers.source(register, max(bytes_, 4))
            )
            made.destination[n] = place
        return None

    def _parameter(self, statement: Statement, parts: list[str]) -> None:
        to, address = statement.operands
        kind, bytes_ = parts[-1], _ACCESS_BYTES.get(parts[-1][1:], 0)
        whole = self.registers.width(to)
        if bytes_ not in (4, 8) or bytes_ > whole or (bytes_ < whole and kind[0] not in "su"):
            raise Unsupported(f"a parameter read as {kind}")
        opcode = f"cvt.{kind[0]}64.{kind}" if bytes_ < whole else f"mov.b{8 * bytes_}"
        made = self._emit(opcode, statement)
        made.destination[0] = self.registers.register(to)
        made.source[0] = self.registers.place(f"{bytes_} of parameter {address.strip('[]')}", bytes_)

    def _atomic_load(self, statement: Statement, parts: list[str]) -> None:
        order = parts[3] if len(parts) > 3 else ""
        opcode = f"ATOMIC_LOAD_{parts[-1]}".upper()
        if (
            parts[:3] != ["ld", "global", "gpu"]
            or order not in ("acquire", "relaxed")
            or opcode not in OPCODES
        ):
            raise Unsupported("only loads of one word for the whole GPU are modelled")
        made = self._emit(opcode, statement)
        made.destination[0] = self.registers.register(statement.operands[0].strip("{}"))
        self._address(made, statement.operands[1], 8)
        made.width = _ORDERS[order]

    def _atomic(self, statement: Statement, parts: list[str]) -> None:
        opcode = f"ATOMIC_{parts[-2]}_{parts[-1]}".upper()
        *order, _, kind = parts[1:]
        scope = [x for x in order if x in ("cta", "cluster")]
        if opcode not in OPCODES or scope or "global" not in order:
            raise Unsupported("the executor does not know this atomic")
        made = self._emit(opcode, statement)
        operands = statement.operands
        if parts[0] == "atom":
            made.destination[0] = self.registers.register(operands[0])
            operands = operands[1:]
        self._address(made, operands[0], 8)
        for n, text in enumerate(operands[1:], 1):
            made.source[n] = self.registers.source(text, width(kind))
        made.width = next((_ORDERS[x] for x in order if x in _ORDERS), 0)

    def _shuffle(self, statement: Statement, parts: list[str]) -> None:
        to, *sources, members = statement.operands
        made = self._emit(f"SHUFFLE_{parts[2]}".upper(), statement)
        for n, register in enumerate(to.split("|")):
            made.destination[n] = self.registers.register(register)
        made.source[:4] = [self.registers.source(x, 4) for x in (*sources, members)]

    def _reduction(self, statement: Statement, parts: list[str]) -> None:
        # Added, two's complements are the same with a sign and without.
        kind = "s32" if parts[2] == "add" else parts[3]
        opcode = f"REDUCE_{parts[2]}_{kind}".upper()
        if opcode not in OPCODES:
            raise Unsupported("the executor does not know this reduction")
        self._of_all_lanes(opcode, statement)

    def _vote(self, statement: Statement, parts: list[str]) -> None:
        if statement.name != "vote.sync.ballot.b32":
            raise Unsupported("the executor does not know this vote")
        self._of_all_lanes("BALLOT", statement)

    def _of_all_lanes(self, opcode: str, statement: Statement) -> None:
        to, of, members = statement.operands
        made = self._emit(opcode, statement)
        made.destination[0] = self.registers.register(to)
        made.source[0], made.source[3] = self.registers.source(of, 4), self.registers.source(members, 4)

    def _matrix(self, statement: Statement, parts: list[str]) -> None:
        if "m8n8" not in parts or parts[-1] != "b16":
            raise Unsupported("only 8 x 8 matrices of 16-bit numbers are modelled")
        load = parts[0] == "ldmatrix"
        values, address = statement.operands if load else reversed(statement.operands)
        made = self._emit(
            "MATRIX_" + ("LOAD" if load else "STORE") + ("_TRANS" if "trans" in parts else ""), statement
        )
        self._address(made, address, 4)
        registers = _group(values)
        made.count = len(registers)
        made.destination[: made.count] = [self.registers.register(x) for x in registers]


def _group(text: str) -> list[str]:
    """The registers of a vector, or the one that stands alone."""
    return [x.strip() for x in text.strip("{} ").split(",")]

"""The operations that act on each lane alone: types of result and sources, and the result as C++ of a, b, c.

This table is the only list of them. Types are PTX's own names, and "p" for a predicate; core/values.h and
core/approximations.h hold the functions that the expressions call.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Operation(NamedTuple):
    result: str
    sources: tuple[str, ...]
    expression: str


_ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# Not the language's own order: -Wall asks for parentheses.
_BITWISE = {"and": "&", "or": "|", "xor": "^"}
_INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
_FLOATS = {"f32": "u32", "f64": "u64"}  # and the integer of their bits
_HALVES = ("bf16", "f16")


def _integers(table: dict[str, Operation]) -> None:
    for bits in (16, 32, 64):
        u, s = f"u{bits}", f"s{bits}"
        for kind in (u, s):
            table[f"add.{kind}"] = Operation(u, (u, u), f"{u}(a + b)")
            table[f"sub.{kind}"] = Operation(u, (u, u), f"{u}(a - b)")
            table[f"mul.lo.{kind}"] = Operation(u, (u, u), f"{u}(u64(a) * b)")
            table[f"mad.lo.{kind}"] = Operation(u, (u, u, u), f"{u}(u64(a) * b + c)")
            table[f"min.{kind}"] = Operation(kind, (kind, kind), "std::min(a, b)")
            table[f"max.{kind}"] = Operation(kind, (kind, kind), "std::max(a, b)")
            table[f"div.{kind}"] = Operation(kind, (kind, kind), "divided(a, b)")
            table[f"rem.{kind}"] = Operation(kind, (kind, kind), "remainder(a, b)")
            for name, sign in _ORDERED.items():
                table[f"setp.{name}.{kind}"] = Operation("p", (kind, kind), f"a {sign} b")
            for name in ("selp", "mov"):
                table[f"{name}.{kind}"] = _moved(name, u)
        for name in ("selp", "mov"):
            table[f"{name}.b{bits}"] = _moved(name, u)
        for name, sign in _BITWISE.items():
            table[f"{name}.b{bits}"] = Operation(u, (u, u), f"{u}(a {sign} b)")
        for name in ("eq", "ne"):
            table[f"setp.{name}.b{bits}"] = Operation("p", (u, u), f"a {_ORDERED[name]} b")
        table[f"not.b{bits}"] = Operation(u, (u,), f"{u}(~a)")
        table[f"neg.s{bits}"] = Operation(u, (u,), f"{u}(0 - a)")
        table[f"abs.s{bits}"] = Operation(s, (s,), f"a < 0 ? {s}(0 - {u}(a)) : a")
        table[f"shl.b{bits}"] = Operation(u, (u, "u32"), f"b >= {bits} ? {u}(0) : {u}(a << b)")
        for kind in (u, f"b{bits}"):
            table[f"shr.{kind}"] = Operation(u, (u, "u32"), f"b >= {bits} ? {u}(0) : {u}(a >> b)")
        table[f"shr.s{bits}"] = Operation(s, (s, "u32"), f"{s}(a >> (b >= {bits} ? {bits - 1} : b))")
    for sign in "su":
        for bits in (16, 32):
            one, two = f"{sign}{bits}", f"{sign}{2 * bits}"
            table[f"mul.wide.{one}"] = Operation(two, (one, one), f"{two}(a) * b")
            sum_ = f"{two}(u{2 * bits}({two}(a) * b) + u{2 * bits}(c))"
            table[f"mad.wide.{one}"] = Operation(two, (one, one, two), sum_)
        table[f"mul.hi.{sign}32"] = Operation(
            f"{sign}32", (f"{sign}32",) * 2, f"{sign}32(({sign}64(a) * b) >> 32)"
        )
        table[f"bfe.{sign}32"] = Operation(f"{sign}32", (f"{sign}32", "u32", "u32"), "extracted(a, b, c)")
    word = ("u32", "u32", "u32")
    table["add.s16x2"] = Operation(
        "u32", word[:2], "((a + b) & 0xffff) | ((a & 0xffff0000u) + (b & 0xffff0000u))"
    )
    table["popc.b32"] = Operation("u32", word[:1], "u32(std::popcount(a))")
    table["clz.b32"] = Operation("u32", word[:1], "u32(std::countl_zero(a))")
    table["brev.b32"] = Operation("u32", word[:1], "reversed(a)")
    table["prmt.b32"] = Operation("u32", word, "permuted(a, b, c)")
    table["shf.l.wrap.b32"] = Operation("u32", word, "u32((((u64(b) << 32) | a) << (c & 31)) >> 32)")
    table["shf.r.wrap.b32"] = Operation("u32", word, "u32(((u64(b) << 32) | a) >> (c & 31))")


def _moved(name: str, kind: str) -> Operation:
    return (
        Operation(kind, (kind, kind, "p"), "c ? a : b") if name == "selp" else Operation(kind, (kind,), "a")
    )


def _predicates(table: dict[str, Operation]) -> None:
    for name, sign in _BITWISE.items():
        table[f"{name}.pred"] = Operation("p", ("p", "p"), f"(a {sign} b) & 1")
    table["not.pred"] = Operation("p", ("p",), "!a")
    table["mov.pred"] = Operation("p", ("p",), "a")


def _comparisons(ordered: bool = True) -> dict[str, str]:
    """Of floats, as functions of a and b. A NaN makes the plain ones false and those ending in u true."""
    unordered = "(a != a || b != b)"
    plain = {name: f"a {sign} b" for name, sign in _ORDERED.items() if name != "ne"} | {
        "ne": "(a < b || a > b)"
    }
    others = {f"{name}u": f"{text} || {unordered}" for name, text in plain.items()}
    return plain | others | {"num": f"!{unordered}", "nan": unordered}


def _floats(table: dict[str, Operation]) -> None:
    for kind, raw in _FLOATS.items():
        for name, sign in {"add": "+", "sub": "-", "mul": "*"}.items():
            table[f"{name}.{kind}"] = table[f"{name}.rn.{kind}"] = Operation(
                kind, (kind, kind), f"a {sign} b"
            )
        table[f"fma.rn.{kind}"] = Operation(kind, (kind, kind, kind), "std::fma(a, b, c)")
        table[f"div.rn.{kind}"] = Operation(kind, (kind, kind), "a / b")
        table[f"rcp.rn.{kind}"] = Operation(kind, (kind,), "1 / a")
        table[f"sqrt.rn.{kind}"] = Operation(kind, (kind,), "std::sqrt(a)")
        for name, function in {"max": "larger", "min": "smaller"}.items():
            table[f"{name}.{kind}"] = Operation(kind, (kind, kind), f"{function}<{raw}>(a, b)")
            table[f"{name}.NaN.{kind}"] = Operation(kind, (kind, kind), f"{function}_or_nan<{raw}>(a, b)")
        table[f"abs.{kind}"] = Operation(kind, (kind,), "std::fabs(a)")
        table[f"neg.{kind}"] = Operation(kind, (kind,), "-a")
        table[f"selp.{kind}"] = Operation(kind, (kind, kind, "p"), "c ? a : b")
        table[f"mov.{kind}"] = Operation(raw, (raw,), "a")
        for name, text in _comparisons().items():
            table[f"setp.{name}.{kind}"] = Operation("p", (kind, kind), text)
    for name in ("add", "sub", "mul", "fma.rn", "max", "min", "abs", "neg"):
        table[f"{name}.ftz.f32"] = _flushing(table[f"{name}.f32"])
    for name in _comparisons():
        table[f"setp.{name}.ftz.f32"] = _flushing(table[f"setp.{name}.f32"])
    for kind in _HALVES:
        for name, text in _comparisons().items():
            read = re.sub(r"\b([ab])\b", rf"from_{kind}(\1)", text)
            table[f"setp.{name}.{kind}"] = Operation("p", ("u16", "u16"), read)
            # Both halves of a word, each into a predicate of its own: the decoder makes two of them.
            for half, place in (("low", "0"), ("high", "16")):
                read = re.sub(r"\b([ab])\b", rf"from_{kind}(u16(\1 >> {place}))", text)
                table[f"setp.{name}.{kind}x2.{half}"] = Operation("p", ("u32", "u32"), read)


def _flushing(operation: Operation) -> Operation:
    text = re.sub(r"\b([abc])\b", r"ftz(\1)", operation.expression)
    return operation._replace(expression=text if operation.result == "p" else f"ftz({text})")


def _approximations(table: dict[str, Operation]) -> None:
    table["ex2.approx.ftz.f32"] = Operation("f32", ("f32",), "ex2(a)")
    table["lg2.approx.ftz.f32"] = Operation("f32", ("f32",), "lg2(a)")
    table["div.full.f32"] = Operation("f32", ("f32", "f32"), "div_full(a, b)")
    table["rcp.approx.ftz.f64"] = Operation("f64", ("f64",), "rcp_gross(a)")


def _conversions(table: dict[str, Operation]) -> None:
    table["cvt.rn.f32.f64"] = Operation("f32", ("f64",), "f32(a)")
    table["cvt.f64.f32"] = Operation("f64", ("f32",), "f64(a)")
    for kind in _HALVES:
        table[f"cvt.f32.{kind}"] = Operation("f32", ("u16",), f"from_{kind}(a)")
        table[f"cvt.f64.{kind}"] = Operation("f64", ("u16",), f"f64(from_{kind}(a))")
        table[f"cvt.rn.{kind}.f32"] = Operation("u16", ("f32",), f"to_{kind}(a)")
        table[f"cvt.rn.{kind}x2.f32"] = Operation(
            "u32", ("f32", "f32"), f"u32(to_{kind}(a)) << 16 | to_{kind}(b)"
        )
    table["cvt.rn.f16.f64"] = Operation("u16", ("f64",), "to_f16(a)")
    for kind in _FLOATS:
        for mode, function in {"rni": "nearbyint", "rmi": "floor", "rpi": "ceil", "rzi": "trunc"}.items():
            table[f"cvt.{mode}.{kind}.{kind}"] = Operation(kind, (kind,), f"std::{function}(a)")
            text = f"to_s32(std::{function}(f64(a)), {'0' if kind == 'f32' else 'INT32_MIN'})"
            table[f"cvt.{mode}.s32.{kind}"] = Operation("s32", (kind,), text)
        for integer in ("s32", "u32", "s64", "u64"):
            table[f"cvt.rn.{kind}.{integer}"] = Operation(kind, (integer,), f"{kind}(a)")
    for mode in ("rni", "rmi", "rpi", "rzi"):
        table[f"cvt.{mode}.ftz.f32.f32"] = _flushing(table[f"cvt.{mode}.f32.f32"])
    for integer in ("s32", "u32"):
        table[f"cvt.f64.{integer}"] = table[f"cvt.rn.f64.{integer}"]
    for to in _INTEGERS:
        for of in ("u8", "s8", *_INTEGERS):
            table[f"cvt.{to}.{of}"] = Operation(to, (of,), f"{to}(a)")


def _table() -> dict[str, Operation]:
    table: dict[str, Operation] = {}
    for part in (_integers, _predicates, _floats, _approximations, _conversions):
        part(table)
    return table


LANEWISE = _table()

# What core/interpreter.h does by hand.
BY_HAND = (
    *("NOTHING", "TRAP", "BRANCH", "RETURN", "BARRIER", "WARP_BARRIER"),
    *("GLOBAL_LOAD", "GLOBAL_STORE", "SHARED_LOAD", "SHARED_STORE"),
    *("MATRIX_LOAD", "MATRIX_LOAD_TRANS", "MATRIX_STORE", "MATRIX_STORE_TRANS"),
    *(
        "ATOMIC_LOAD_B32",
        "ATOMIC_LOAD_B64",
        "ATOMIC_EXCH_B32",
        "ATOMIC_CAS_B32",
        "ATOMIC_ADD_F32",
        "ATOMIC_ADD_F64",
    ),
    *(
        "ATOMIC_ADD_U32",
        "ATOMIC_ADD_U64",
        "ATOMIC_MAX_S32",
        "ATOMIC_MIN_S32",
        "ATOMIC_OR_B32",
        "ATOMIC_AND_B32",
    ),
    *("SHUFFLE_BFLY", "SHUFFLE_IDX", "SHUFFLE_UP", "SHUFFLE_DOWN", "BALLOT"),
    *("REDUCE_ADD_S32", "REDUCE_MAX_S32", "REDUCE_MIN_S32", "REDUCE_MAX_U32", "REDUCE_MIN_U32"),
    *("REDUCE_AND_B32", "REDUCE_OR_B32", "REDUCE_XOR_B32", "UNPACK", "PACK"),
)
OPCODES = {name: n for n, name in enumerate((*BY_HAND, *LANEWISE))}


def width(kind: str) -> int:
    """Bytes that one lane of a register of this type takes: 16 bits lie in a word."""
    return 8 if kind.endswith("64") else 4


def _function(name: str) -> str:
    result, sources, expression = LANEWISE[name]
    lane = f"u{8 * width(result)}"
    arrays = "".join(
        f"const u{8 * width(kind)}* {letter}s = (const u{8 * width(kind)}*)(r + i.source[{n}]); "
        for n, (kind, letter) in enumerate(zip(sources, "abc", strict=False))
    )
    reads = "".join(
        f"auto {letter} = {_read(kind, letter + 's[l]')}; "
        for kind, letter in zip(sources, "abc", strict=False)
    )
    if result[0] == "f":
        made = f"bits<{lane}>({result}({expression}))"
    else:
        made = f"{lane}({expression})" if result == "p" else f"{lane}(u{result[1:]}({expression}))"
    return (
        f"// {name}\n"
        f"static void lanewise_{OPCODES[name]}(u8* r, const Instruction& i, u32 lanes) {{\n"
        f"    {arrays}\n"
        f"    alignas(64) {lane} made[LANES];\n"
        f"    for (int l = 0; l < LANES; l++) {{ {reads}made[l] = {made}; }}\n"
        f"    put(({lane}*)(r + i.destination[0]), made, lanes);\n}}\n"
    )


def _read(kind: str, text: str) -> str:
    if kind in _FLOATS:
        return f"bits<{kind}>({text})"
    return f"({text} & 1)" if kind == "p" else f"{kind}({text})"


def generated() -> str:
    """core/operations.inc."""
    opcodes = ", ".join(f"{name} = {OPCODES[name]}" for name in BY_HAND)
    table = ", ".join(f"lanewise_{OPCODES[name]}" for name in LANEWISE)
    return (
        f"enum Opcode : s32 {{ {opcodes}, FIRST_LANEWISE = {len(BY_HAND)} }};\n"
        + "".join(map(_function, LANEWISE))
        + f"static const Lanewise LANEWISE[] = {{ {table} }};\n"
    )

"""Small kernels in PTX, for tests of single instructions: one warp a block, arrays in and arrays out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .operations import LANEWISE
from .parser import ISA_VERSION
from .program import Buffer, Program, Report, Settings

_POOLS = "  .reg .pred %p<64>;\n  .reg .b16 %rs<64>;\n  .reg .b32 %r<64>;\n  .reg .b64 %rd<64>;\n"


def module(body: str, parameters: int, warps: int = 1) -> str:
    """A kernel whose parameters p0, p1, ... are pointers, loaded into %rd0, %rd1, ...

    %r61 is the thread's number in its block, %r62 the block's, %r63 the thread's number in the grid.
    """
    names = ",\n".join(f"  .param .u64 .ptr .global .align 1 p{n}" for n in range(parameters))
    loads = "".join(f"  ld.param.b64 %rd{n}, [p{n}];\n" for n in range(parameters))
    place = (
        f"  mov.u32 %r62, %ctaid.x;\n  mov.u32 %r61, %tid.x;\n  mad.lo.s32 %r63, %r62, {32 * warps}, %r61;\n"
    )
    return (
        f".version {ISA_VERSION}\n.target sm_90\n.address_size 64\n"
        f".extern .shared .align 16 .b8 global_smem[];\n.visible .entry snippet(\n{names}\n)\n"
        f".reqntid {32 * warps}\n{{\n{_POOLS}{loads}{place}{body}\n  ret;\n}}\n"
    )


def run(
    body: str, arrays: Sequence[np.ndarray], *, blocks: int = 1, warps: int = 1, shared_bytes: int = 0,
    settings: Settings | None = None, counted: bool = False,
) -> Report:  # fmt: skip
    """The kernel over these arrays, which it may change."""
    program = Program(module(body, len(arrays), warps))
    buffers = [Buffer(x.ctypes.data, x.nbytes, bool(x.flags.writeable)) for x in arrays]
    values = [x.ctypes.data for x in arrays]
    return program.run((blocks, 1, 1), values, buffers, shared_bytes, settings or Settings(), counted)


def element(pointer: int, bytes_: int, to: str) -> str:
    """Puts the address of this thread's element into `to`."""
    return f"  mad.wide.u32 {to}, %r63, {bytes_}, %rd{pointer};\n"


_POOL = {1: "rs", 2: "rs", 4: "r", 8: "rd"}


def _register(kind: str, n: int) -> str:
    if kind == "p":
        return f"%p{n}"
    bytes_ = int("".join(filter(str.isdigit, kind))) // 8
    return f"%{_POOL[bytes_]}{20 + n}"


def lanewise(name: str, *sources: np.ndarray, error: str = "none", seed: int = 0) -> np.ndarray:
    """An operation of the table on arrays of its types or their raw bits; predicates come back as 0 and 1."""
    operation = LANEWISE[name]
    n = len(sources[0])
    padded = -(-n // 32) * 32
    body, registers, arrays = "", [], []
    for at, (kind, source) in enumerate(zip(operation.sources, sources, strict=True)):
        raw = np.zeros(padded, {"p": "u4"}.get(kind, f"u{source.dtype.itemsize}"))
        raw[:n] = source if kind == "p" else source.view(raw.dtype)
        arrays.append(raw)
        bytes_ = raw.dtype.itemsize
        loaded = f"%{_POOL[bytes_]}{40 + at}" if kind == "p" else _register(kind, at)
        body += element(at, bytes_, "%rd40") + f"  ld.global.b{8 * bytes_} {loaded}, [%rd40];\n"
        if kind == "p":
            body += f"  setp.ne.b32 {_register(kind, at)}, {loaded}, 0;\n"
        registers.append(_register(kind, at))
    result = _register(operation.result, 8)
    if name.endswith((".low", ".high")):
        pair = (result, "_") if name.endswith(".low") else ("_", result)
        body += f"  {name.rsplit('.', 1)[0]} {'|'.join(pair)}, {', '.join(registers)};\n"
    else:
        body += f"  {name} {', '.join([result, *registers])};\n"
    kind = operation.result
    if kind == "p":
        body += f"  selp.b32 %r50, 1, 0, {result};\n"
        result, kind = "%r50", "u32"
    bits = max(int("".join(filter(str.isdigit, kind))), 16)
    out = np.zeros(padded, f"u{bits // 8}")
    body += element(len(arrays), bits // 8, "%rd40") + f"  st.global.b{bits} [%rd40], {result};\n"
    arrays.append(out)
    run(body, arrays, blocks=padded // 32, settings=Settings(error=error, seed=seed))
    dtype = {"f32": np.float32, "f64": np.float64}.get(kind) or np.dtype(
        f"{'i' if kind[0] == 's' else 'u'}{bits // 8}"
    )
    return out[:n].view(dtype)

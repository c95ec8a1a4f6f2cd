"""A Triton kernel compiled for a GPU that need not be there, by the compilers in Triton's own wheel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kl_gpu.backends.triton.launch import FP_FUSION

from .classes import V_CLASSES
from .kernels import Entry
from .machine_code import Path as Code
from .machine_code import parse_gcn, parse_sass

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
_LOGITS = ("a_ptr", "b_ptr", "x_ptr", "grad_a_ptr", "grad_b_ptr", "grad_ptr")


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel; registers and spilled bytes of a thread, shared bytes of a program.

    `columns` are those that one pass through each of its main loops covers. `reductions` are the types of
    what it reduces: shapes, and which thread owns which element.
    """

    code: Code
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    columns: tuple[int, ...]
    reductions: tuple[str, ...]


def warp_size(arch: str) -> int:
    return 64 if arch.startswith("gfx") else 32


def signature(entry: Entry, dtype: str) -> dict[str, str]:
    """Argument types as a launch would give them: pointers, 64-bit strides, 32-bit sizes, floats."""
    types: dict[str, str] = {}
    for name in entry.function.arg_names:
        if name in entry.types:
            types[name] = entry.types[name]
        elif name == "valid_ptr":
            types[name] = "*i1"
        elif name == "scales_ptr":  # None, as all rows share their temperatures
            types[name] = "constexpr"
        elif name in _LOGITS:
            types[name] = f"*{dtype}"
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
        elif name in ("n_inner", "V"):
            types[name] = "i32"
        elif name.endswith(("_outer", "_inner")):
            types[name] = "i64"
        elif name.endswith(("_high", "_low")) or name.startswith("near_"):
            types[name] = "fp32"
        else:
            types[name] = "constexpr"
    return types


def compile_entry(entry: Entry, dtype: str, arch: str, V_class: str) -> Compiled:
    amd = arch.startswith("gfx")
    logits = V_CLASSES[V_class].logits(dtype)
    configuration = entry.configuration(logits, warp_size(arch))
    warps, registers = configuration["num_warps"], configuration.get("maxnreg")
    options = {"num_warps": warps, "enable_fp_fusion": FP_FUSION}
    if registers and not amd:  # only NVIDIA's compiler knows the limit
        options["maxnreg"] = registers
    names = list(entry.function.arg_names)
    types = signature(entry, dtype)
    source = ASTSource(
        fn=entry.function,
        signature=types,
        constexprs={
            (names.index(n),): value
            for n, value in {"scales_ptr": None, **configuration}.items()
            if n in names
        },
    )
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    built = triton_compile(source, target=target, options=options)
    read = _read_gcn(built.asm["amdgcn"]) if amd else _read_cubin(built.asm["cubin"])
    columns = entry.columns(logits, warp_size(arch))
    return Compiled(*read, int(built.metadata.shared), warps, columns, reductions(built.asm["ttgir"]))


def reductions(ttgir: str) -> tuple[str, ...]:
    """The operands' types of every `tt.reduce`, in the order of the code, with their layouts written out."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    types = re.findall(r'"tt\.reduce"\(.*?^\s*\}\) : \((.*?)\) ->', ttgir, re.DOTALL | re.MULTILINE)
    return tuple(re.sub(r"#\w+\b(?!\.)", lambda name: layouts[name[0]], one) for one in types)


def _read_gcn(assembly: str) -> tuple[Code, int, int]:
    """Instructions, registers and spilled bytes from assembly with its metadata."""

    def figure(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise ValueError(f"no .{name} in the assembly's metadata")
        return int(found[1])

    # Scalar registers that overflow move to lanes of a vector register (v_writelane), not to memory.
    spilled = max(4 * figure("vgpr_spill_count"), figure("private_segment_fixed_size"))
    return parse_gcn(assembly.splitlines()), figure("vgpr_count"), spilled


def tool(name: str) -> str:
    """One of the programs in Triton's wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _printed(name: str, *arguments: str) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _read_cubin(cubin: bytes) -> tuple[Code, int, int]:
    """Instructions, registers and spilled bytes of a cubin with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass, usage = _printed("nvdisasm", "-c", str(path)), _printed("cuobjdump", "-res-usage", str(path))
    used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    # Spills go to local memory, as do arrays; these kernels have none.
    return parse_sass(sass.splitlines()), int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])

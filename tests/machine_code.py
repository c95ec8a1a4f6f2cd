"""Compiles the Triton kernels for GPUs this machine does not have, and reads what came out.

Run as a program it prints one JSON object per (kernel, variant, architecture): registers, spilled bytes, and
for the kernel's hottest loop (the innermost one with the most exponentials; the whole kernel if it has no
loop) the width of global loads and stores and the instructions per pair of logits. It needs Triton's wheel,
which carries ptxas and nvdisasm, and no GPU; and a process of its own, since the test suite may have
imported the kernels for the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Audit:
    """What one compiled kernel does per pair of logits on its usual path through the main loop."""

    kernel: str
    kind: str
    dtype: str
    arch: str
    registers: int
    spill_bytes: int
    load_bits: int
    store_bits: int
    instructions_per_pair: float
    exponentials_per_pair: float


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _disassemble(cubin: bytes) -> tuple[list[str], int, int]:
    """SASS lines with addresses, registers and spilled bytes of a cubin with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass = subprocess.run(
            [_tool("nvdisasm"), "-c", "-plr", str(path)], capture_output=True, text=True, check=False
        ).stdout
        sass = (
            sass
            or subprocess.run(
                [_tool("nvdisasm"), "-c", str(path)], capture_output=True, text=True, check=True
            ).stdout
        )
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True
        )
    usage_text = usage.stdout + usage.stderr
    registers = int(re.search(r"REG:(\d+)", usage_text)[1])
    # Spills go to local memory, as do arrays; these kernels have none.
    spill_bytes = int(re.search(r"STACK:(\d+)", usage_text)[1]) + int(
        re.search(r"LOCAL:(\d+)", usage_text)[1]
    )
    return sass.splitlines(), registers, spill_bytes


def _usual_path(code: list[str], labels: dict[str, int], start: int, end: int) -> list[str]:
    """The shortest way from a loop's head to its back edge: what runs when no rare branch is taken."""
    came_from = {start: start}
    frontier = [start]
    while frontier and end not in came_from:
        following = []
        for at in frontier:
            branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", code[at])
            steps = [] if branch and not code[at].startswith("@") and ", " not in code[at] else [at + 1]
            steps += [labels[branch[1]]] if branch else []
            for step in steps:
                if start <= step <= end and step not in came_from:
                    came_from[step] = at
                    following.append(step)
        frontier = following
    if end not in came_from:
        return code
    path = [end]
    while path[-1] != start:
        path.append(came_from[path[-1]])
    return [code[at] for at in reversed(path)]


def _paths(lines: list[str]) -> Iterator[list[str]]:
    """The usual path through each loop, in the order of their heads, then through the whole kernel."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1].strip())
    edges = []
    for end, text in enumerate(code):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        if target and labels.get(target[1], end + 1) <= end and end != labels[target[1]]:
            edges.append((labels[target[1]], end))
    for start, end in sorted(edges):
        yield _usual_path(code, labels, start, end)
    exits = [at for at, text in enumerate(code) if re.search(r"\bEXIT\b", text) and not text.startswith("@")]
    paths = [_usual_path(code, labels, 0, at) for at in exits]
    # Not the way of a row that is masked out.
    yield min((path for path in paths if _exponentials(path)), key=len, default=code)


def _width(code: list[str], mnemonic: str) -> int:
    """Widest global access of the kind in bits, 0 if there is none."""
    widths = [0]
    for text in code:
        if re.search(rf"\b{mnemonic}\b", text):
            vector = re.search(r"\.(128|64)\b", text)
            widths.append(int(vector[1]) if vector else 8 if ".U8" in text else 16 if ".U16" in text else 32)
    return max(widths)


def _exponentials(code: list[str]) -> int:
    return sum("MUFU.EX2" in text for text in code)


def _signature(kernel: Any, logits: torch.dtype) -> dict[str, str]:
    """Argument types as a launch would give them: pointers, 64-bit strides, 32-bit sizes, floats."""
    pointer = {
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.float32: "*fp32",
        torch.float64: "*fp64",
    }
    rows = "*fp64" if logits == torch.float64 else "*fp32"
    types = {}
    for name in kernel.arg_names:
        if name == "rows_ptr":
            types[name] = "*i1"
        elif name in ("a_ptr", "b_ptr", "grad_a_ptr", "grad_b_ptr"):
            types[name] = pointer[logits]
        elif name.endswith("_ptr"):
            types[name] = rows
        elif name.endswith(("_outer", "_inner")) and name != "n_inner":
            types[name] = "i64"
        elif name.endswith(("_high", "_low")):
            types[name] = "fp32"
        elif name in ("n_inner", "V"):
            types[name] = "i32"
    return types


def compile_kernel(kernel: Any, logits: torch.dtype, constants: dict[str, Any], arch: int) -> bytes:
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "maxnreg") if name in constants}
    names = list(kernel.arg_names)
    signature = _signature(kernel, logits)
    # 16-byte-aligned rows: what a vocabulary that is a multiple of 16 gives.
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind[0] in "*i" and name != "n_inner"
    }
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    return triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]


def audit(
    kernel: Any, name: str, kind: str, logits: torch.dtype, arch: int, constants: dict[str, Any]
) -> Audit:
    lines, registers, spills = _disassemble(compile_kernel(kernel, logits, constants, arch))
    *loops, whole = _paths(lines)
    # The streaming loop comes first in the kernel; the loops of the careful path follow it.
    body = next((loop for loop in loops if _exponentials(loop) and _width(loop, "LDG")), whole)
    pairs = constants["R"] * constants["VEC"] / (32 * constants["num_warps"])
    return Audit(
        kernel=name,
        kind=kind,
        dtype=str(logits).removeprefix("torch."),
        arch=f"sm_{arch}",
        registers=registers,
        spill_bytes=spills,
        load_bits=_width(body, "LDG"),
        store_bits=_width(body, "STG"),
        instructions_per_pair=round(len(body) / pairs, 1),
        exponentials_per_pair=round(_exponentials(body) / pairs, 1),
    )


FAMILIES = ("jeffreys", "js", "skew", "tv")
SIDES = (("a", True, False), ("b", False, True), ("both", True, True))


def audits() -> Iterator[Audit]:
    from kl_gpu.problem import Problem
    from kl_gpu.triton import gradients, kl, launch, sums

    for logits in (torch.bfloat16, torch.float16, torch.float32):
        # float16 differs from bfloat16 by the difference's rounding error alone, which KL shows.
        families = () if logits == torch.float16 else FAMILIES
        example = torch.empty(1, 1, 128256, dtype=logits, device="meta")
        problem = Problem(example, example, None, "kl", 0.0, 1.0, 1.0)
        value, second, grad = (
            {**launch.configuration(problem, shapes), "HAS_ROWS": True}
            for shapes in (kl.VALUE_SHAPES, sums.SUMS_SHAPES, gradients.GRADIENT_SHAPES)
        )
        for arch in ARCHITECTURES:
            yield audit(kl._value_kernel, "value", "kl", logits, arch, value)
            for family in families:
                constants = {**second, "FAMILY": family, "EXACT": False}
                yield audit(sums._sums_kernel, "sums", family, logits, arch, constants)
            for family in ("kl", *families):
                for side, to_a, to_b in SIDES if family == "kl" else SIDES[-1:]:
                    constants = {**grad, "FAMILY": family, "TO_A": to_a, "TO_B": to_b}
                    kind = f"{family}, to {side}"
                    yield audit(gradients._gradient_kernel, "gradient", kind, logits, arch, constants)


if __name__ == "__main__":
    for line in audits():
        print(json.dumps(asdict(line)), flush=True)

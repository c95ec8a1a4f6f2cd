"""Compiles a part of what `python -m bench audit` does, and prints one JSON object per compilation.

Every kernel and family on sm_90; elsewhere all of KL, and of the other families the heaviest kernels.
One-sided gradients on sm_90 alone; float16, whose code is bfloat16's but for conversions, in one kernel. A
process of its own, since the test suite may have imported the kernels for the interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from bench.audit.compiled import compile_entry
from bench.audit.kernels import ComplementEntry, Entry, entries
from bench.audit.rows import counted

# Where kernels are compiled in their heaviest form and one dtype only.
HEAVIEST = (
    ("fp32", "sm_80", "aligned"),
    ("bf16", "sm_100", "aligned"),
    ("bf16", "gfx942", "aligned"),
    ("bf16", "sm_90", "odd"),
)
# Of KL and of the statistics, every class that differs from the others, and what is next to it.
CLASSES = (
    ("bf16", "sm_90", "unaligned"),
    ("bf16", "sm_90", "odd, words"),
    ("fp32", "sm_90", "unaligned"),
    ("fp32", "sm_90", "odd"),
)


def is_heaviest(entry: Entry) -> bool:
    return entry.side in ("", "both") or entry.sweeps_value


def dtypes(entry: Entry) -> tuple[str, ...]:
    """Those that are compiled for aligned rows on sm_90."""
    if "kl" not in entry.kind:  # the other dtypes differ little, as KL shows
        return ("bf16",) if is_heaviest(entry) else ()
    return ("bf16", "fp32", "fp16") if entry.kernel == "value" else ("bf16", "fp32")


def cases() -> Iterator[tuple[Entry, str, str, str]]:
    """(entry, dtype, architecture, class of V)"""
    for entry in entries():
        if isinstance(entry, ComplementEntry):
            continue  # remainder_code.py
        kl = "kl" in entry.kind
        yield from ((entry, dtype, "sm_90", "aligned") for dtype in dtypes(entry))
        if is_heaviest(entry) and (kl or entry.kernel == "value_grad"):
            yield from ((entry, *case) for case in HEAVIEST)
            if kl:
                yield from ((entry, *case) for case in CLASSES)


if __name__ == "__main__":
    for case in cases():
        compiled = compile_entry(*case)
        print(json.dumps({**asdict(counted(*case, compiled)), "reductions": compiled.reductions}), flush=True)

"""Compiles the kernels of backends.triton.complement without a GPU; one JSON object per compilation."""

from __future__ import annotations

import json
from dataclasses import asdict

from bench.audit.compiled import compile_entry
from bench.audit.kernels import ComplementEntry, entries
from bench.audit.rows import counted

CASES = (
    ("bf16", "sm_90", "aligned"),
    ("fp32", "sm_80", "aligned"),
    ("bf16", "sm_100", "aligned"),
    ("bf16", "gfx942", "aligned"),
    *(("bf16", "sm_90", V_class) for V_class in ("unaligned", "odd", "odd, words")),
)

if __name__ == "__main__":
    for entry in entries():
        if isinstance(entry, ComplementEntry):
            for case in CASES:
                compiled = compile_entry(entry, *case)
                found = asdict(counted(entry, *case, compiled))
                print(json.dumps({**found, "reductions": compiled.reductions}), flush=True)

"""Compiles the kernels of backends.triton.complement without a GPU; one JSON object per compilation."""

from __future__ import annotations

import json
from dataclasses import asdict

from bench.audit.kernels import ComplementEntry, entries
from bench.audit.rows import audit_one

CASES = (
    ("bf16", "sm_90", "aligned"),
    ("fp32", "sm_80", "aligned"),
    ("bf16", "sm_100", "aligned"),
    ("bf16", "gfx942", "aligned"),
    ("bf16", "sm_90", "odd"),
)

if __name__ == "__main__":
    for entry in entries():
        if isinstance(entry, ComplementEntry):
            for case in CASES:
                print(json.dumps(asdict(audit_one(entry, *case))), flush=True)

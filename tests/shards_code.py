"""Compiles the kernel of kl_gpu.backends.triton.shard without a GPU; one JSON object per compilation."""

from __future__ import annotations

import json
from dataclasses import asdict

from bench.audit.kernels import shard_entries
from bench.audit.rows import audit_one

CASES = (("bf16", "sm_90", "aligned"), ("fp32", "sm_80", "aligned"), ("bf16", "gfx942", "aligned"))

if __name__ == "__main__":
    for entry in shard_entries():
        for case in CASES:
            print(json.dumps(asdict(audit_one(entry, *case))), flush=True)

"""Compiles the main kernels as they are launched, and with the compiler free to fuse sums of products.

One JSON object per kernel; a process of its own, as machine_code.py.
"""

from __future__ import annotations

import json

from bench.audit import compiled
from bench.audit.kernels import entries
from bench.audit.rows import audit_one

# Between them they sweep for a KL, a formula's sums, both KLs and over one tensor, and write gradients.
CASES = {
    ("value_grad", "kl, to b"),
    ("value", "js"),
    ("token_stats", "both kl"),
    ("value", "remainder, entropy"),
}


if __name__ == "__main__":
    for entry in entries():
        if (entry.kernel, entry.kind) in CASES:
            counts = {}
            for fusion in (False, True):
                compiled.FP_FUSION = fusion  # as the launcher's own, which the audit takes
                row = audit_one(entry, "bf16", "sm_90", "aligned")
                counts["fused" if fusion else "as written"] = row.instructions_per_element
            print(json.dumps({"kernel": entry.kernel, "kind": entry.kind, **counts}), flush=True)

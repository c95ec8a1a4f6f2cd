"""Which compiled kernels a set of calls needs, without compiling or launching any.

Run as a program, without TRITON_INTERPRET: prints, per kernel, the number of distinct cache keys over calls
that differ in β, temperature and number of rows. Triton's own code computes the keys, for sm_90.
"""

from __future__ import annotations

import json
from collections import defaultdict

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kl_gpu import kinds
from kl_gpu.backends import triton
from kl_gpu.backends.interface import RowPair

KEYS: dict[str, set[str]] = defaultdict(set)
BACKEND = make_backend(GPUTarget("cuda", 90, 32))


def note(kernel: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
    binder = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    _, specialization, compile_options = binder(*arguments, **options)
    KEYS[kernel.__name__].add(f"{specialization} {compile_options}")


def main() -> None:
    JITFunction.run = note
    generator = torch.Generator().manual_seed(0)
    for i in range(100):
        beta, temperature = (torch.rand(2, generator=generator) * 0.98 + 0.01).tolist()
        sides = torch.empty(2, 1, 1 + i % 7, 4096)
        for kind in ("jeffreys", "js", "skew_forward_kl", "skew_reverse_kl"):
            problem = RowPair.of(sides[0], sides[1], None, kind, beta, 1 / temperature, 1 / temperature)
            _, stats = triton.value(problem)
            scale, grad = stats[:, 0].contiguous(), torch.empty_like(sides[0])
            triton.gradient(problem, stats, scale, grad, None)
            triton.value_and_gradient(problem, scale, grad, None)
    formulas = {kinds.KINDS[k].formula for k in ("jeffreys", "js", "skew_forward_kl")}
    print(json.dumps({"formulas": len(formulas), "keys": {name: len(keys) for name, keys in KEYS.items()}}))


if __name__ == "__main__":
    main()

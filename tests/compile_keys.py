"""Which compiled kernels a set of calls needs, without compiling or launching any.

Run as a program, without TRITON_INTERPRET. It prints, per kernel, the number of distinct cache keys over
calls that differ in β, temperature, number of rows and the strides of dimensions of size 1; for each way in
which rows are loaded, the number of keys over calls that differ in where rows lie; and whether sums of
products are fused, as launches say it. Triton's own code computes the keys, for sm_90.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, create_function_from_signature

from bench.host import Driver
from kl_gpu import kinds
from kl_gpu.backends import triton
from kl_gpu.backends.interface import ComplementArgs, RowPair

KEYS: dict[str, set[str]] = defaultdict(set)
FP_FUSION: set[object] = set()
BACKEND = make_backend(GPUTarget("cuda", 90, 32))


def note(kernel: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
    binder = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    _, specialization, compile_options = binder(*arguments, **options)
    KEYS[kernel.__name__].add(f"{specialization} {compile_options}")
    FP_FUSION.add(options.get("enable_fp_fusion"))


def noted(calls: Callable[[], None]) -> dict[str, int]:
    """The number of keys of each kernel that the calls need."""
    KEYS.clear()
    calls()
    return {name: len(keys) for name, keys in KEYS.items()}


def calls_that_differ_in_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(100):
        beta, temperature = (torch.rand(2, generator=generator) * 0.98 + 0.01).tolist()
        sides = torch.empty(2, 1, 1 + i % 7, 4096)
        if i % 7 == 0:
            # One row, as wide slices of tensors of odd shapes have it: its strides mean nothing.
            sides = sides.as_strided((2, 1, 1, 4096), (4096, 1 + i, 4097 + i, 1))
        for kind in ("jeffreys", "js", "skew_forward_kl", "skew_reverse_kl"):
            problem = RowPair.of(sides[0], sides[1], None, kind, beta, 1 / temperature, 1 / temperature)
            _, stats = triton.value(problem)
            scale, grad = stats[:, 0].contiguous(), torch.empty_like(sides[0])
            triton.gradient(problem, stats, scale, grad, None)
            triton.value_and_gradient(problem, scale, grad, None)
            triton.formula_sums(problem, stats)
        triton.token_stats(problem, None)
        ids = torch.zeros(problem.n_rows, 1 + i % 5, dtype=torch.int64)
        args = ComplementArgs(sides[0], ids, None, 1 / temperature)
        rest, _, stats = triton.complement(args, False)
        triton.complement_gradient(args, stats, ids.double(), rest, None, torch.empty_like(sides[0]))


def calls_on(*places: tuple[int, int, int]) -> Callable[[], None]:
    """The value of bfloat16 rows of V columns, so many apart, the first at this column of its buffer."""

    def calls() -> None:
        for V, apart, first in places:
            side = torch.empty(4 * apart + first, dtype=torch.bfloat16)
            rows = side.as_strided((1, 3, V), (3 * apart, apart, 1), first)
            triton.value(RowPair.of(rows, rows, None, "forward_kl", 0.0, 1.0, 1.0))

    return calls


# 2056 columns are whole runs, and no multiple of 16. The last token's logits lie at multiples of a row.
LAYOUTS = {
    "aligned": calls_on((2048, 2048, 0), (2056, 2056, 0), (2048, 2056, 8), (2048, 9 * 2048, 8 * 2048)),
    "unaligned": calls_on((2048, 2049, 0), (2056, 2056, 1), (2048, 2052, 4)),
    "odd": calls_on((2049, 2049, 0), (2049, 2064, 1), (2049, 9 * 2049, 8 * 2049)),
    "odd, in words": calls_on((2049, 2064, 0), (2049, 2064, 16), (2049, 2050, 2)),
}


def main() -> None:
    driver.set_active(Driver())
    JITFunction.run = note
    formulas = {kinds.KINDS[k].formula for k in ("jeffreys", "js", "skew_forward_kl")}
    keys = noted(calls_that_differ_in_numbers)
    layouts = {name: noted(calls)["pair_kernel"] for name, calls in LAYOUTS.items()}
    found = {"formulas": len(formulas), "keys": keys, "layouts": layouts}
    print(json.dumps({**found, "fp_fusion": sorted(FP_FUSION, key=str)}))


if __name__ == "__main__":
    main()

"""Cases for kernels/testing/judge.cpp, which runs where Python is not at hand: inputs, what the float64
reference says comes out, and how far off each number may be by the promises of DESIGN.md.

    python tests/reference_vectors.py FILE
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from elementary import elementary, rounded_points
from test_native import DTYPES, EDGES, INF, Divergence, judged, pair, with_rounding
from torch import Tensor

from kl_gpu import reference
from kl_gpu.kinds import KINDS
from realistic_rows import FAMILIES

RAW = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
# A vector, its half, its neighbours; a step of every format; a first tile, a tile; and more than one block.
WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 130, 511, 577, 1000, 4100]
MORE_THAN_A_BLOCK = 33001


class Case(NamedTuple):
    """One case as the file has it: a header and, in order, the arrays."""

    what: str
    inputs: list[np.ndarray]
    expected: np.ndarray
    bound: np.ndarray
    rows: int
    columns: int
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
    formula: str = "kl"
    n: int = 0
    scales: tuple[float, float] = (1.0, 1.0)
    beta: float = 0.0

    def packed(self) -> bytes:
        a, b = (DTYPES.index(dtype) for dtype in self.dtypes)
        header = struct.pack(
            "16s16s5q3d", self.what.encode(), self.formula.encode(), a, b, self.rows, self.columns, self.n,
            *self.scales, self.beta
        )  # fmt: skip
        assert self.expected.shape == self.bound.shape
        bound = np.where(np.isnan(self.expected), 0.0, self.bound)
        assert (bound >= 0).all(), (self.what, self.formula, self.columns)
        numbers = [x.astype(np.float64) for x in (self.expected, bound)]
        return b"".join([header, *(np.ascontiguousarray(x).tobytes() for x in self.inputs + numbers)])


def as_bytes(x: Tensor) -> np.ndarray:
    return x.contiguous().view(RAW[x.dtype]).numpy()


def value_bound(exact: np.ndarray, slack: np.ndarray | float) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.where(exact < 1e-12, 1e-17 + 1e-2 * exact, 5e-6 * exact) + slack, posinf=0.0)


def pair_case(s: Tensor, t: Tensor, of: Divergence, scales: tuple[float, float] = (1.0, 1.0)) -> Case:
    """Value and both gradients of `[1, rows, V]`."""
    want = judged(s, t, of, *scales)
    value = np.asarray(want.value, float)
    # So that the gradients of rows far apart stay in their format.
    row_scale = (1 / np.maximum(1, np.nan_to_num(value, posinf=1.0))).astype(np.float32).astype(float)
    grads, bounds = [], []
    for grad, bound, side in zip(want.grads, want.bounds, (s, t), strict=True):
        scaled = np.asarray(grad, float) * row_scale[None, :, None]
        grads.append(scaled.ravel())
        bounds.append(with_rounding(bound * row_scale[None, :, None], scaled, side.dtype).ravel())
    (a, grad_a, bound_a, scale_a), (b, grad_b, bound_b, scale_b) = of.as_ab(
        *zip((s, t), grads, bounds, scales, strict=True)
    )
    return Case(
        "pair",
        [as_bytes(a), as_bytes(b), row_scale],
        np.concatenate([value, grad_a, grad_b]),
        np.concatenate([value_bound(value, want.slack), bound_a, bound_b]),
        *s.shape[1:],
        (a.dtype, b.dtype),
        of.formula,
        scales=(scale_a, scale_b),
        beta=of.beta,
    )


def stats_case(s: Tensor, t: Tensor) -> Case:
    """Token statistics; the last row's token is no column."""
    rows, columns = s.shape[1:]
    tokens = np.arange(rows, dtype=np.int64) * 7 % columns
    x, y = (side.double().numpy()[0].astype(np.longdouble) for side in (s, t))
    with np.errstate(all="ignore"):
        want = {name: np.array(z, float) for name, z in reference.token_stats(x, y, tokens).items()}
    tokens[-1] = -1
    exact, bound = [], []
    with np.errstate(invalid="ignore"):
        slack = np.nan_to_num(
            2e-7 * (1 + np.abs(np.logaddexp.reduce(x, -1) - np.logaddexp.reduce(y, -1)).astype(float))
        )
    for name, z in want.items():
        if name.endswith("logprob"):
            z[-1] = np.nan
        exact.append(z)
        if name.endswith("_kl") or name == "js":
            bound.append(value_bound(z, 0.0))
        elif name in ("tv", "acceptance"):
            bound.append(value_bound(z, slack))
            if columns == 1:  # of which the kernels say nothing
                z[~np.isnan(z)] = 0
        else:
            bound.append(0 * z if name == "top1_agree" else 5e-6 * np.maximum(1, np.abs(np.nan_to_num(z))))
    return Case(
        "stats", [as_bytes(t), as_bytes(s), tokens], np.concatenate(exact),
        np.nan_to_num(np.concatenate(bound)), rows, columns, (t.dtype, s.dtype)
    )  # fmt: skip


def rest_case(x: Tensor, temperature: float = 1.0) -> Case:
    """What lies outside three columns, one of them named twice, and an id that names none."""
    rows, columns = x.shape[1:]
    ids = np.tile(np.array([0, columns - 1, columns // 2, columns // 2, columns]), (rows, 1))
    picked = np.where(ids < columns, 0.25, 9.0)
    to_lse, to_entropy = np.full(rows, 0.5), np.linspace(-1, 1, rows)
    scale = 1 / temperature
    z = x.double().numpy()[0].astype(np.longdouble) * scale
    out = np.zeros(z.shape, bool)
    out[:, ids[0][ids[0] < columns]] = True
    with np.errstate(all="ignore"):
        others = np.where(out, -np.inf, z)
        bad = (np.isnan(others) | (others == np.inf)).any(-1)
        top = others.max(-1, keepdims=True)
        log_sum = (top + np.log(np.exp(others - top).sum(-1, keepdims=True)))[:, 0]
        lse = np.where(bad, np.nan, np.where(top[:, 0] == -np.inf, -np.inf, log_sum))
        log_pi = others - lse[:, None]
        pi = np.where(others == -np.inf, 0, np.exp(log_pi))
        entropy = np.where(bad, np.nan, -np.where(pi > 0, pi * log_pi, 0).sum(-1))
        flow = to_lse[:, None] * pi - to_entropy[:, None] * np.where(
            pi > 0, pi * (log_pi + entropy[:, None]), 0
        )
        grad = np.where(out, 0.25, np.where(bad[:, None], np.nan, flow)) * scale
        size = np.maximum(1, np.where(pi > 0, np.abs(log_pi), 0)) + np.abs(np.nan_to_num(entropy))[:, None]
        grad_bound = 2e-6 * np.maximum(np.nan_to_num(pi), np.abs(np.nan_to_num(flow))) * size * scale
    exact = np.concatenate([lse, entropy, grad.ravel()])
    # Of the rest's entropy log2 of a sum of weights of 2.5 ulp is the smallest part.
    bound = [np.full(rows, 5e-6), 5e-6 * np.abs(np.nan_to_num(entropy)) + 4e-7]
    return Case(
        "rest", [as_bytes(x), ids, picked, to_lse, to_entropy], exact,
        np.concatenate([*bound, with_rounding(grad_bound, grad, x.dtype).ravel()]), rows, columns,
        (x.dtype, x.dtype), n=ids.shape[1], scales=(scale, scale)
    )  # fmt: skip


def function_cases() -> Iterator[Case]:
    """The elementary functions, each to its documented ulp, and the rounding of stores."""
    functions = elementary(20_000)
    for which, of in enumerate(functions):
        want, ulp = of.expected()
        yield Case("function", [of.points], want, of.allowed * ulp, 1, len(want), n=which)
    x = rounded_points()[-(1 << 17) :]
    for which, dtype in enumerate((torch.bfloat16, torch.float16), len(functions)):
        want = torch.from_numpy(x).to(dtype).double().numpy()
        yield Case("function", [x], want, np.zeros(len(x)), 1, len(x), n=which)


def any_bits(
    dtype: torch.dtype, rows: int, columns: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Any bits; in every other row none of NaN and +inf, so that something finite comes out.

    What is past 2^20 is brought down by 2^108: float64 does not hold the difference of 1e30 and 1 either.
    """
    ends = torch.iinfo(RAW[dtype])
    shape = (2, 1, rows, columns)
    sides = torch.randint(ends.min, ends.max, shape, dtype=RAW[dtype], generator=generator).view(dtype)
    sides = torch.where(sides.abs() < 2**20, sides, sides * 2.0**-108)
    for x in sides:
        tame = x[:, ::2]
        tame[tame.isnan() | (tame == INF)] = 1.0
    return sides[0], sides[1]


def edge(name: str, dtype: torch.dtype, columns: int) -> tuple[Tensor, Tensor]:
    """A case of EDGES at both ends of two rows, between plain ones that must not notice."""
    s, t = pair(5, columns, 0.3, 0.7, dtype)
    teacher, student = (torch.tensor(x, dtype=torch.float64).to(dtype) for x in EDGES[name])
    for row, first in [(1, 0), (3, columns - 4)]:
        if name.endswith("all") or name == "one column left" or name == "disjoint":
            t[0, row], s[0, row] = -INF, -INF
        t[0, row, first : first + 4], s[0, row, first : first + 4] = teacher, student
    return s, t


def realistic_pair(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator, family: int = 0
) -> tuple[Tensor, Tensor]:
    s, t = list(FAMILIES.values())[family % len(FAMILIES)](rows, max(columns, 64), generator)
    return s[None, :, :columns].to(dtype), t[None, :, :columns].to(dtype)


def cases() -> Iterator[Case]:
    """Every kind, format, width and edge, with every value of one beside most of another, and any bits."""
    generator = torch.Generator().manual_seed(24)
    kinds = [Divergence(*kind.at(None)) for kind in KINDS.values()]
    yield from function_cases()
    for i, columns in enumerate([*WIDTHS, MORE_THAN_A_BLOCK]):
        rows = 1 if columns > 4100 else 3
        for j, dtype in enumerate(DTYPES):
            other = DTYPES[(j + 1) % 4] if i % 5 == 4 else dtype
            s, t = realistic_pair(rows, columns, dtype, generator, i + j)
            t = t.to(other)
            for of in kinds[(i + j) % 2 :: 2] if columns < 1000 else [kinds[(i + j) % len(kinds)]]:
                yield pair_case(s, t, of, (1.0, 1.0) if i % 3 else (0.5, 0.5 if i % 2 else 0.8))
            yield stats_case(s, t)
            yield rest_case(s, 0.7 if i % 2 else 1.0)
    for i, name in enumerate(EDGES):
        for j, dtype in enumerate(DTYPES):
            s, t = edge(name, dtype, 4 if (i + j) % 2 else 40)
            for of in kinds[(i + j) % 3 :: 3]:
                yield pair_case(s, t, of)
            yield stats_case(s, t)
            yield rest_case(s)
    for dtype in DTYPES[:3]:
        for i, columns in enumerate((1, 3, 16, 31, 130)):
            s, t = any_bits(dtype, 12, columns, generator)
            yield pair_case(s, t, kinds[0])
            yield pair_case(s, t, kinds[1 + i % (len(kinds) - 1)])
            yield stats_case(s, t)
            yield rest_case(s)


def write(path: Path) -> int:
    """Writes every case; gives how many there are."""
    with np.errstate(all="ignore"):
        packed = [case.packed() for case in cases()]
    path.write_bytes(b"".join(packed))
    return len(packed)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))

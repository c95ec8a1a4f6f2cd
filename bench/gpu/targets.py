"""The targets for a GPU, and what a run says of each, as a table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[dict[str, Any]]  # a report's rows
Figure = tuple[str, bool]  # what was measured, worded, and whether it meets the target
Read = Callable[[Rows], Figure | None]  # None: not measured

NOT_MEASURED = "not measured"
_FULL = 1024  # rows that fill a GPU; fewer are another question
_KLS = ("forward_kl", "reverse_kl")


@dataclass(frozen=True)
class Target:
    work: str
    wanted: str
    read: Read


def _chosen(rows: Rows, **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _full(rows: Rows, **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in _chosen(rows, **wanted) if row["N"] >= _FULL]


def _share(work: str, wanted: float) -> Read:
    """The least share of copy speed of both KLs over all V ≥ 32000."""

    def read(rows: Rows) -> Figure | None:
        ours = _full(rows, system="kl_gpu", work=work, dtype="bf16")
        shares = [row["share_of_copy"] for row in ours if row["kind"] in _KLS and row["V"] >= 32000]
        if not shares:
            return None
        return f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %", min(shares) >= wanted

    return read


def _of_baseline(
    baseline: str,
    kind: str,
    cost: Callable[[dict[str, Any]], float],
    word: str,
    meets: Callable[[float], bool],
) -> Read:
    """A baseline's cost ÷ ours, of value and gradient at V = 128256 in bf16, of one run and one N."""
    task = {"kind": kind, "work": "value_grad", "dtype": "bf16", "V": 128256}

    def read(rows: Rows) -> Figure | None:
        for theirs in _full(rows, system=baseline, **task):
            for ours in _chosen(rows, system="kl_gpu", N=theirs["N"], **task):
                ratio = cost(theirs) / cost(ours)
                return word.format(ratio, 1 / ratio), meets(ratio)
        return None

    return read


def _faster(baseline: str, kind: str, wanted: float) -> Read:
    return _of_baseline(baseline, kind, _time, "{:.1f} ×", lambda ratio: ratio >= wanted)


def _time(row: dict[str, Any]) -> float:
    """In times of the copy beside it: not every baseline is timed in the same passes as ours was last."""
    return 1 / row["share_of_copy"]


def _memory(row: dict[str, Any]) -> float:
    return row["peak_extra_bytes"]


def _even(rows: Rows) -> Figure | None:
    """Time per byte against the faster of the neighbouring V, at its worst over works and dtypes."""
    worst = 0.0
    for work, dtype in {(row["work"], row["dtype"]) for row in rows}:
        line = _full(rows, system="kl_gpu", kind="forward_kl", work=work, dtype=dtype)
        largest = {row["V"]: row["ms"] / row["bytes"] for row in sorted(line, key=lambda row: row["N"])}
        for here, there in itertools.pairwise(largest[V] for V in sorted(largest)):
            worst = max(worst, here / there, there / here)
    return (f"{worst:.2f} × at worst", worst <= 1.15) if worst else None


def _one_row(rows: Rows) -> Figure | None:
    task = {"system": "kl_gpu", "kind": "forward_kl", "work": "value", "dtype": "bf16"}
    found = _chosen(rows, N=1, V=128256, **task)
    return (f"{found[0]['ms'] * 1000:.1f} µs", found[0]["ms"] < 0.015) if found else None


_BOTH = "value + gradient, bf16"
_LEANER = _of_baseline("torch", "forward_kl", _memory, "{1:.2f} of it", lambda ratio: ratio >= 4)
TARGETS = (
    Target("value, bf16, V ≥ 32k", "≥ 95 % of copy speed at 2 U", _share("value", 0.95)),
    Target("value + gradient in one call, bf16, V ≥ 32k", "≥ 85 % at 3 U", _share("value_grad", 0.85)),
    Target('forward then backward ("none"), bf16', "≥ 90 % at 5 U", _share("forward_backward", 0.90)),
    Target(f"{_BOTH}, V = 128256, against torch.compile", "≥ 5 ×", _faster("torch.compile", "forward_kl", 5)),
    Target("the same against plain PyTorch", "≥ 10 ×", _faster("torch", "forward_kl", 10)),
    Target("its peak extra memory against plain PyTorch's", "≤ 1/4", _LEANER),
    Target("js against Liger's JSD with its log-softmax", "≥ 3 ×", _faster("liger", "js", 3)),
    Target("time per byte against the neighbouring V", "≤ 1.15 ×", _even),
    Target("value of one row, V = 128256, bf16", "< 15 µs", _one_row),
)


def worded(target: Target, rows: Rows) -> str:
    figure = target.read(rows)
    if figure is None:
        return NOT_MEASURED
    text, met = figure
    return text if met else f"{text} (missed)"


def table(rows: Rows) -> str:
    """Of one run, as Markdown."""
    lines = [f"| {target.work} | {target.wanted} | {worded(target, rows)} |" for target in TARGETS]
    return "\n".join(["| | target | measured |", "|---|---|---|", *lines])

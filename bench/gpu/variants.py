"""Which variants of the kernels a call compiles, by the audit's list of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from torch import Tensor

from kl_gpu.kinds import KINDS

from ..audit.classes import VClass
from ..audit.kernels import ComplementEntry, Entry, entries, shard_entries
from .calls import Call

_LANES = 32


@dataclass(frozen=True)
class Variant:
    """An entry of the audit with what its kernel is compiled for. V is one of those that it serves."""

    entry: Entry
    dtype: str
    configuration: tuple[tuple[str, str], ...]
    vocab: int = field(compare=False)


@dataclass(frozen=True)
class _Incoming(Entry):
    """The gradient's kernel as the backward of a loss that has its gradient already launches it."""

    def configuration(self, logits: Tensor, lanes: int) -> dict[str, Any]:
        return super().configuration(logits, lanes) | {"HAS_INCOMING": True}


@cache
def _all() -> tuple[Entry, ...]:
    return *entries(), *shard_entries()


def _entry(kernel: str, formula: str, side: str = "") -> Entry:
    (found,) = (e for e in _all() if (e.kernel, e.formula, e.side) == (kernel, formula, side))
    return found


def _entries(what: str, formula: str, student: str) -> list[Entry]:
    value, gradient = _entry("value", formula), _entry("gradient", formula, student)
    if what == "value":
        return [value]
    if what in ("value_grad", "in place"):
        incoming = _Incoming(**{each.name: getattr(gradient, each.name) for each in fields(gradient)})
        return [_entry("value_grad", formula, student), incoming]
    if what == "forward_backward":
        return [value, gradient]
    if what == "both sides":
        return [value, _entry("gradient", formula, "both")]
    if what == "token_stats":
        return [_entry("token_stats", "kl")]
    if what == "formula_sums":
        return [value, _entry("formula_sums", formula)]
    kind = "remainder, entropy" if what == "token_logprobs" else "remainder"
    return [entry for entry in _all() if isinstance(entry, ComplementEntry) and entry.kind == kind]


def variants(call: Call) -> frozenset[Variant]:
    kind = KINDS[call.kind]
    student = "a" if kind.expectation_under == "student" else "b"
    found = []
    for entry in _entries(call.what, kind.formula, student):
        configuration = entry.configuration(VClass(call.vocab, call.vocab).logits(call.dtype), _LANES).items()
        named = tuple(sorted((name, str(value)) for name, value in configuration))
        found.append(Variant(entry, call.dtype, named, call.vocab))
    return frozenset(found)

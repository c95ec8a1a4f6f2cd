"""How far fp32 results are from float64 on rows like a trained model's, per backend, entry and kind.

Prints the worst error of each as a share of the promise, writes them to accuracy.json, and draws the relative
errors against the size of D to accuracy-light.svg and accuracy-dark.svg, ours beside what is usually written.
The rows are those of `tests/realistic_rows.py`. In every second round the student is moved towards the
teacher where no side is cut, which makes small D.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kl_gpu
from kl_gpu import reference
from kl_gpu.backends import registry
from kl_gpu.reference import topk as reference_topk
from kl_gpu.topk.formulas import RESOLUTION, TAIL_KINDS
from tests.realistic_rows import COPIES, FAMILIES, Trained, nearer, train

from . import figures
from .harness import machine
from .harness.options import usual_device
from .harness.systems import PLAIN

Floats = NDArray[np.floating[Any]]
Name = tuple[str, str]  # entry and kind

BASELINES = {"forward_kl": "F.kl_div(log_softmax, log_softmax)", "js": "plain fp32 JSD"}
RELATIVE = 5e-6  # the promise
BINS = np.logspace(-12, 2, 57)  # of D, for the picture
MODEL_VOCAB, WIDE_VOCAB = 4096, 50257
_CHUNK = 250
_K = 16


@dataclass
class Worst:
    """Of one backend, entry and kind: the largest error, relative, and as a share of the promised bound."""

    backend: str
    entry: str
    kind: str
    rows: int = 0
    max_rel_error: float = 0.0
    share_of_promise: float = 0.0
    case: str = ""

    def add(self, case: str, error: Floats, size: Floats, bound: Floats) -> None:
        self.rows += len(error)
        if not len(error):
            return
        self.max_rel_error = float(np.maximum(self.max_rel_error, (error / size).max()))
        share = float((error / bound).max())
        # A NaN stays, with the first case that had one.
        if not math.isnan(self.share_of_promise) and not share <= self.share_of_promise:
            self.share_of_promise, self.case = share, case


@dataclass
class Findings:
    worst: dict[tuple[str, str, str], Worst] = field(default_factory=dict)
    # Per system, kind and bin of D: the worst relative error, -inf where no row came.
    by_size: dict[tuple[str, str], Floats] = field(default_factory=dict)

    def of(self, backend: str, entry: str, kind: str) -> Worst:
        return self.worst.setdefault((backend, entry, kind), Worst(backend, entry, kind))

    def add_by_size(self, system: str, kind: str, value: Floats, relative: Floats) -> None:
        line = self.by_size.setdefault((system, kind), np.full(len(BINS) - 1, -np.inf))
        np.maximum.at(line, np.clip(np.searchsorted(BINS, value) - 1, 0, len(line) - 1), relative)


def chunks(model: Trained, rows: int, vocab: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(case, student, teacher) until all cases together have had so many rows."""
    generator = torch.Generator().manual_seed(0)
    cases = [*FAMILIES, *(copy for copy in COPIES if vocab == MODEL_VOCAB and copy != "itself")]
    size = max(1, min(_CHUNK, rows // len(cases)))
    for turn in range(-(-rows // size)):
        case = cases[turn % len(cases)]
        own = case in FAMILIES
        pair = FAMILIES[case](size, vocab, generator) if own else model.pair(case, size, generator)
        if turn // len(cases) % 2 and not any(torch.isinf(side).any() for side in pair):
            pair, case = nearer(pair, generator), f"{case}, nearer"
        yield case, *pair


def _numpy(x: Tensor) -> Floats:
    return x.cpu().double().numpy()


class Truth(NamedTuple):
    """Rows that no promise speaks of have no finite `size`, and do not count."""

    value: Floats
    size: Floats  # what errors are relative to
    beside: Floats | float = 0.0  # what they may be beside the promised share of it


class Chunk:
    """Logits, what is asked about them, and the answers in float64."""

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        self.student, self.teacher = student, teacher
        self.labels = teacher.argmax(-1)
        # Any token, every second row.
        self.labels[1::2] = (self.labels[1::2] * 7 + 1) % teacher.shape[-1]
        self.some = slice(0, max(1, len(student) // 10))  # the rows of topk_div, whose kinds are many
        known, self.ids = teacher[self.some].double().log_softmax(-1).topk(min(_K, teacher.shape[-1]))
        self.known = known.float()

    def truths(self) -> dict[Name, Truth]:
        s, t, labels = _numpy(self.student), _numpy(self.teacher), self.labels.cpu().numpy()
        found: dict[Name, Truth] = {}
        for kind in kl_gpu.KINDS:
            value = reference.divergence(s, t, kind)
            beside = _first_order(s, t) if kind == "tv" else 0.0
            found["divergence", kind] = Truth(value, _within(value, 1e-12, 1e2), beside)
        for name, value in reference.token_stats(s, t, labels).items():
            size = _within(value, 1e-12, 1e2) if name.endswith("_kl") else np.maximum(1, np.abs(value))
            found["token_stats", name] = Truth(value, size, 0.5 if name == "top1_agree" else 0.0)
        logprob, entropy = reference_topk.token_logprobs(s, labels), reference_topk.entropy(s)
        found["token_logprobs", "log-probability"] = Truth(logprob, _within(np.abs(logprob), 1e-300))
        found["token_logprobs", "entropy"] = Truth(entropy, np.maximum(1, _within(entropy, 1e-300)))
        return found | self._topk_truths(s[self.some])

    def _topk_truths(self, s: Floats) -> dict[Name, Truth]:
        known, ids = _numpy(self.known), self.ids.cpu().numpy()
        held = np.zeros(s.shape, bool)
        np.put_along_axis(held, ids, True, -1)
        found = {}
        for tail, kind in _topk_kinds():
            value, gradient, *_ = reference_topk.topk_div(
                s, known, ids, kind, tail=tail, resolution=RESOLUTION[torch.float32]
            )
            # Beside 5e-6 of the value, what 2e-7 of the rest's mass makes of it.
            to_rest = np.abs(np.where(held, 0.0, gradient).sum(-1))
            size = _within(np.abs(value), 1e-9)
            found["topk_div", f"{tail}, {kind}"] = Truth(value, size, 2e-7 * to_rest + 1e-13)
        return found

    def answers(self, backend: str) -> Iterator[tuple[Name, Any]]:
        student, teacher = self.student, self.teacher
        for kind in kl_gpu.KINDS:
            value = kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend)
            yield ("divergence", kind), value
        stats = kl_gpu.token_stats(student, teacher, self.labels, backend=backend)
        for name in kl_gpu.TokenStats._fields[:7]:
            yield ("token_stats", name), getattr(stats, name)
        both = kl_gpu.token_logprobs(student, self.labels, entropy=True, backend=backend)
        for name, value in zip(("log-probability", "entropy"), both, strict=True):
            yield ("token_logprobs", name), value
        for tail, kind in _topk_kinds():
            how: dict[str, Any] = {"tail": tail, "reduction": "none", "backend": backend}
            loss = kl_gpu.topk_div(student[self.some], self.known, self.ids, kind, **how)
            yield ("topk_div", f"{tail}, {kind}"), loss


def _topk_kinds() -> list[tuple[str, str]]:
    return [(tail, kind) for tail, kinds in TAIL_KINDS.items() for kind in kinds]


def _within(value: Floats, low: float, high: float = np.finfo(float).max) -> Floats:
    """NaN outside."""
    return np.where((value >= low) & (value <= high), value, np.nan)


def _first_order(student: Floats, teacher: Floats) -> Floats:
    """What `tv` may be off by beside 5e-6 of itself."""
    tops = (side.max(-1) - reference.log_softmax(side).max(-1) for side in (student, teacher))
    return 2e-7 * (1 + np.abs(np.subtract(*tops)))


def compare(found: Findings, case: str, chunk: Chunk, backends: Sequence[str], drawn: str) -> None:
    """Every entry on one chunk; errors by size of D are those of the backend `drawn`."""
    truths = chunk.truths()
    for backend in backends:
        for (entry, kind), answer in chunk.answers(backend):
            value, size, beside = truths[entry, kind]
            keep = np.isfinite(size)
            error, bound = np.abs(_numpy(answer) - value)[keep], (RELATIVE * size + beside)[keep]
            size = size[keep]
            found.of(backend, entry, kind).add(case, error, size, bound)
            if backend == drawn and entry == "divergence":
                found.add_by_size("kl_gpu", kind, size, error / size)
    for kind in BASELINES if drawn in backends else ():
        value, size, _ = truths["divergence", kind]
        plain = _numpy(PLAIN[kind](chunk.student.float(), chunk.teacher.float()))
        # Of a row where a side lacks a column the usual formula is NaN (0 · inf): it would hide all others.
        keep = np.isfinite(size) & ~np.isnan(plain)
        found.add_by_size("torch", kind, size[keep], (np.abs(plain - value) / size)[keep])


def measure(
    model: Trained, rows: int, vocab: int, backends: Sequence[str], device: torch.device,
    found: Findings | None = None,
) -> Findings:  # fmt: skip
    """The findings of so many rows of this width, added to those in `found`."""
    found = Findings() if found is None else found
    drawn = registry.resolve(None, device)
    for case, student, teacher in chunks(model, rows, vocab):
        with np.errstate(all="ignore"), torch.no_grad():
            compare(found, case, Chunk(student.to(device), teacher.to(device)), backends, drawn)
    return found


def document(found: Findings, about: dict[str, Any]) -> dict[str, Any]:
    """What accuracy.json holds."""
    results = [
        {"system": system, "kind": kind, "D": float(np.sqrt(low * high)), "max_rel_error": float(error)}
        for (system, kind), line in found.by_size.items()
        for low, high, error in zip(BINS[:-1], BINS[1:], line, strict=True)
        if error != -np.inf
    ]
    return {**about, "worst": [asdict(worst) for worst in found.worst.values()], "results": results}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", type=int, default=3000, help=f"of V = {MODEL_VOCAB}; the published figures are of 100000")
    add("--wide-rows", type=int, default=0, help=f"of V = {WIDE_VOCAB}, beside them; published: 2000")
    add("--out", type=Path, default=Path("out/accuracy"), metavar="DIR")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device = usual_device()
    backend = registry.resolve(None, device)
    backends, model = list(dict.fromkeys([backend, "eager"])), train(MODEL_VOCAB)
    found = measure(model, options.rows, MODEL_VOCAB, backends, device)
    if options.wide_rows:
        measure(model, options.wide_rows, WIDE_VOCAB, backends, device, found)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"device": machine.name(device), "backend": backend, "torch": torch.__version__}
    about["date"] = date.today().isoformat()
    sizes = {"rows": options.rows, "wide_rows": options.wide_rows, "wide_vocab": WIDE_VOCAB}
    text = json.dumps(document(found, about | sizes), indent=1)
    (options.out / "accuracy.json").write_text(text + "\n")
    pictures = figures.draw(options.out, options.out, ["accuracy"])
    for worst in sorted(found.worst.values(), key=lambda worst: (worst.backend, worst.entry)):
        name = f"{worst.backend} {worst.entry} {worst.kind}"
        print(f"{name:46} {worst.share_of_promise:6.1%} of the promise, at {worst.case}")
    for picture in pictures:
        print(picture)
    return 0

"""How far fp32 results are from float64 on rows like a trained model's, per backend, entry and kind.

Prints the worst relative error of each, writes them to accuracy.json, and draws them against the size of D to
accuracy.png, ours beside what is usually written. The rows are those of `tests/realistic_rows.py`. In every
second round the student is moved towards the teacher where no side is cut, which makes small D.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import kl_gpu
from kl_gpu import reference
from kl_gpu.backends import registry
from kl_gpu.reference import topk as reference_topk
from kl_gpu.topk.formulas import RESOLUTION, TAIL_KINDS
from tests.realistic_rows import COPIES, FAMILIES, Trained, nearer, train

from .harness import machine
from .harness.options import usual_device
from .harness.systems import PLAIN

Floats = NDArray[np.floating[Any]]

BASELINES = {"forward_kl": "F.kl_div(log_softmax, log_softmax)", "js": "plain fp32 JSD"}
RELATIVE = 5e-6  # the promise
BINS = np.logspace(-12, 2, 57)  # of D, for the picture
MODEL_VOCAB = 4096
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
        self._take(float((error / bound).max()), case)

    def merge(self, other: Worst) -> None:
        self.rows += other.rows
        self.max_rel_error = float(np.maximum(self.max_rel_error, other.max_rel_error))
        self._take(other.share_of_promise, other.case)

    def _take(self, share: float, case: str) -> None:
        """A NaN stays, with the first case that had one."""
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

    def merge(self, other: Findings) -> None:
        for (backend, entry, kind), worst in other.worst.items():
            self.of(backend, entry, kind).merge(worst)
        for key, line in other.by_size.items():
            self.by_size[key] = np.maximum(self.by_size.get(key, line), line)


def shares(rows: int, vocab: int) -> tuple[list[str], int, int]:
    """The cases that so many rows of this width come from in turn, the number of chunks, and their rows."""
    cases = [*FAMILIES, *(copy for copy in COPIES if vocab == MODEL_VOCAB and copy != "itself")]
    size = max(1, min(_CHUNK, rows // len(cases)))
    return cases, -(-rows // size), size


def chunks(model: Trained, rows: int, vocab: int, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(case, student, teacher) until all cases together have had so many rows."""
    generator = torch.Generator().manual_seed(seed)
    cases, number, size = shares(rows, vocab)
    for turn in range(number):
        case = cases[turn % len(cases)]
        if case in FAMILIES:
            pair = FAMILIES[case](size, vocab, generator)
        else:
            pair = model.pair(case, size, generator)
        if turn // len(cases) % 2 and not any(torch.isinf(side).any() for side in pair):
            pair, case = nearer(pair, generator), f"{case}, nearer"
        yield case, *pair


def _numpy(x: Tensor) -> Floats:
    return x.cpu().double().numpy()


def _first_order(student: Floats, teacher: Floats) -> Floats:
    """What `tv` may be off by beside 5e-6 of itself."""
    tops = (side.max(-1) - reference.log_softmax(side).max(-1) for side in (student, teacher))
    return 2e-7 * (1 + np.abs(np.subtract(*tops)))


def compare(
    found: Findings, case: str, student: Tensor, teacher: Tensor, backends: Sequence[str], drawn: str | None
) -> None:
    """Every entry on one chunk; errors by size of D are those of the backend `drawn`."""
    s, t = _numpy(student), _numpy(teacher)
    for kind in kl_gpu.KINDS:
        want = reference.divergence(s, t, kind)
        keep = (want >= 1e-12) & (want <= 1e2)
        size = want[keep]
        bound = RELATIVE * size + (_first_order(s, t)[keep] if kind == "tv" else 0)
        for backend in backends:
            got = kl_gpu.divergence(student, teacher, kind, reduction="none", backend=backend)
            off = np.abs(_numpy(got)[keep] - size)
            found.of(backend, "divergence", kind).add(case, off, size, bound)
            if backend == drawn:
                found.add_by_size("kl_gpu", kind, size, off / size)
        if drawn in backends and kind in BASELINES:
            off = np.abs(_numpy(PLAIN[kind](student.float(), teacher.float()))[keep] - size)
            found.add_by_size("torch", kind, size, off / size)
    _compare_tokens(found, case, (student, s), (teacher, t), backends)


def _compare_tokens(
    found: Findings, case: str, of_student: tuple[Tensor, Floats], of_teacher: tuple[Tensor, Floats],
    backends: Sequence[str],
) -> None:  # fmt: skip
    (student, s), (teacher, t) = of_student, of_teacher
    labels = teacher.argmax(-1)
    labels[1::2] = (labels[1::2] * 7 + 1) % teacher.shape[-1]  # any token, every second row
    ids = labels.cpu().numpy()
    stats = reference.token_stats(s, t, ids)
    logprob, entropy = reference_topk.token_logprobs(s, ids), reference_topk.entropy(s)
    some = slice(0, max(1, len(student) // 10))  # the rows of topk_div, whose kinds are many
    known, known_ids = teacher[some].double().log_softmax(-1).topk(min(_K, teacher.shape[-1]))
    known = known.float()
    topk = {
        (tail, kind): reference_topk.topk_div(
            s[some], _numpy(known), known_ids.cpu().numpy(), kind, tail=tail,
            resolution=RESOLUTION[torch.float32],
        )[:2]
        for tail, kinds in TAIL_KINDS.items()
        for kind in kinds
    }  # fmt: skip
    held = np.zeros(s[some].shape, bool)
    np.put_along_axis(held, known_ids.cpu().numpy(), True, -1)
    for backend in backends:
        got = kl_gpu.token_stats(student, teacher, labels, backend=backend)
        for name, exact in stats.items():
            value = _numpy(getattr(got, name))
            keep = np.isfinite(exact)
            if name == "top1_agree":
                wrong = (value != exact)[keep].astype(float)
                found.of(backend, "token_stats", name).add(case, wrong, np.ones_like(wrong), 0.5 + 0 * wrong)
                continue
            if name.endswith("_kl"):
                keep &= (exact >= 1e-12) & (exact <= 1e2)
                size = exact[keep]
            else:
                size = np.maximum(1, np.abs(exact[keep]))
            off = np.abs(value[keep] - exact[keep])
            found.of(backend, "token_stats", name).add(case, off, size, RELATIVE * size)
        for name, tensor, exact in zip(
            ("log-probability", "entropy"),
            kl_gpu.token_logprobs(student, labels, entropy=True, backend=backend),
            (logprob, entropy),
            strict=True,
        ):
            keep = np.isfinite(exact) & (exact != 0)
            size = np.abs(exact[keep]) if name != "entropy" else np.maximum(1, exact[keep])
            off = np.abs(_numpy(tensor)[keep] - exact[keep])
            found.of(backend, "token_logprobs", name).add(case, off, size, RELATIVE * size)
        for (tail, kind), (exact, gradient) in topk.items():
            loss = kl_gpu.topk_div(
                student[some], known, known_ids, kind, tail=tail, reduction="none", backend=backend
            )
            assert isinstance(loss, Tensor)
            keep = np.isfinite(exact) & (np.abs(exact) >= 1e-9)
            size = np.abs(exact[keep])
            off = np.abs(_numpy(loss)[keep] - exact[keep])
            # Beside 5e-6 of the value, what 2e-7 of the rest's mass makes of it.
            to_rest = np.abs(np.where(held, 0.0, gradient).sum(-1)[keep])
            found.of(backend, "topk_div", f"{tail}, {kind}").add(
                case, off, size, RELATIVE * size + 2e-7 * to_rest + 1e-13
            )


def measure(
    model: Trained, rows: int, vocab: int, backends: Sequence[str], device: torch.device, seed: int = 0,
    found: Findings | None = None,
) -> Findings:  # fmt: skip
    """The findings of so many rows of this width, added to those in `found`."""
    found = Findings() if found is None else found
    drawn = registry.resolve(None, device)
    shown = f"V = {vocab}: {', '.join(backends)}"
    for case, student, teacher in track(chunks(model, rows, vocab, seed), shown, transient=True):
        with np.errstate(all="ignore"), torch.no_grad():
            compare(found, case, student.to(device), teacher.to(device), backends, drawn)
    return found


def plot(found: Findings, path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    middle = np.sqrt(BINS[1:] * BINS[:-1])
    for (system, kind), line in found.by_size.items():
        baseline, seen = system != "kl_gpu", np.isfinite(line)
        axes.loglog(
            middle[seen],
            np.maximum(line[seen], 1e-9),
            label=BASELINES[kind] if baseline else f"kl_gpu {kind}",
            linestyle="--" if baseline else "-",
            linewidth=2.5 if baseline else 1.2,
        )
    axes.axhline(RELATIVE, color="grey", linewidth=0.8)
    axes.annotate("promised: 5e-6", (1e-12, 6e-6), color="grey", fontsize=8)
    axes.set(xlabel="divergence D, nats", ylabel="worst relative error", title=title, ylim=(1e-9, 1e6))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(found: Findings) -> Table:
    shown = Table("backend", "entry", "kind", "rows", "worst relative", "of the promise", "at")
    for worst in sorted(found.worst.values(), key=lambda worst: (worst.backend, worst.entry)):
        shown.add_row(
            worst.backend, worst.entry, worst.kind, f"{worst.rows}", f"{worst.max_rel_error:.1e}",
            f"{worst.share_of_promise:.1%}", worst.case,
        )  # fmt: skip
    return shown


def document(found: Findings, about: dict[str, Any]) -> dict[str, Any]:
    """What accuracy.json holds."""
    results = [
        {"system": system, "kind": kind, "D": float(np.sqrt(low * high)), "max_rel_error": float(error)}
        for (system, kind), line in found.by_size.items()
        for low, high, error in zip(BINS[:-1], BINS[1:], line, strict=True)
        if error != -np.inf
    ]
    return {**about, "worst": [asdict(worst) for worst in found.worst.values()], "results": results}


def _job(share: tuple[int, int, int, list[str], torch.device, int]) -> Findings:
    rows, wide_rows, wide_vocab, backends, device, seed = share
    torch.set_num_threads(1)
    model = train(MODEL_VOCAB)
    found = measure(model, rows, MODEL_VOCAB, backends, device, seed)
    return measure(model, wide_rows, wide_vocab, backends, device, seed, found) if wide_rows else found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", type=int, default=3000, help=f"of V = {MODEL_VOCAB}; README's figures are of 100000")
    add("--wide-rows", type=int, default=0, help="of V = --wide-vocab, beside them; README's: 2000")
    add("--wide-vocab", type=int, default=50257)
    add("--backends", nargs="+", choices=kl_gpu.BACKENDS, help="all that compile, by default")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=1, help="processes that share the rows")
    add("--out", type=Path, default=Path("out/accuracy"), metavar="DIR")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device = usual_device()
    usual = ["triton", "eager"] if device.type == "cuda" else [registry.resolve(None, device), "eager"]
    backends = list(dict.fromkeys(options.backends or usual))
    rows, wide_rows = (-(-number // options.jobs) for number in (options.rows, options.wide_rows))
    jobs = [
        (rows, wide_rows, options.wide_vocab, backends, device, options.seed + job)
        for job in range(options.jobs)
    ]
    found = Findings()
    # Not forked: a child would wait for the threads that PyTorch had in its parent.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for share in pool.map(_job, jobs):
            found.merge(share)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": machine.name(device),
        "backend": registry.resolve(None, device),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "rows": options.rows,
        "wide_rows": options.wide_rows,
        "wide_vocab": options.wide_vocab,
    }
    text = json.dumps(document(found, about), indent=1)
    (options.out / "accuracy.json").write_text(text + "\n")
    title = f"fp32 logits like a trained model's, worst of {options.rows + options.wide_rows} rows"
    plot(found, options.out / "accuracy.png", title)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # lest a file be wrapped
    console.print(table(found))
    console.print(f"{options.out / 'accuracy.png'}")
    return 0

"""How far fp32 results are from float64, against the size of D: ours beside what is usually written.

    python -m bench.accuracy --out bench/results

writes accuracy.png and accuracy.json. Logits t ~ 3·N(0,1) and s = t + ε·N(0,1) with ε from 1e-7 to 10.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import kl_gpu
from kl_gpu import reference
from kl_gpu.ops import resolve_backend

from . import machine
from .systems import PLAIN

SPREADS = np.logspace(-7, 1, 41)
PEERS = {"forward_kl": "F.kl_div(log_softmax, log_softmax)", "js": "plain fp32 JSD"}


def errors(vocab: int, rows: int, device: torch.device) -> list[dict[str, object]]:
    """Per kind, spread and system: the rows' median D, and the worst relative error among them."""
    found: list[dict[str, object]] = []
    for spread in SPREADS:
        teacher = 3 * torch.randn(rows, vocab, device=device)
        student = teacher + spread * torch.randn_like(teacher)
        s, t = (x.cpu().double().numpy() for x in (student, teacher))
        for kind in kl_gpu.KINDS:
            want = reference.divergence(s, t, kind)
            systems = {"kl_gpu": kl_gpu.divergence(student, teacher, kind, reduction="none")}
            if kind in PEERS:
                systems["torch"] = PLAIN[kind](student, teacher)
            for system, got in systems.items():
                value = got.cpu().double().numpy()
                found.append(
                    {
                        "system": system,
                        "kind": kind,
                        "spread": float(spread),
                        "D": float(np.median(want)),
                        "max_rel_error": float((np.abs(value - want) / want).max()),
                        "negative": int((value < 0).sum()),
                    }
                )
    return found


def plot(found: list[dict[str, object]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for system, kind in dict.fromkeys((row["system"], row["kind"]) for row in found):
        line = [row for row in found if (row["system"], row["kind"]) == (system, kind)]
        peer = system != "kl_gpu"
        axes.loglog(
            [row["D"] for row in line],
            [max(float(str(row["max_rel_error"])), 1e-9) for row in line],
            label=PEERS[str(kind)] if peer else f"kl_gpu {kind}",
            linestyle="--" if peer else "-",
            linewidth=2.5 if peer else 1.2,
        )
    axes.axhline(5e-6, color="grey", linewidth=0.8)
    axes.annotate("promised: 5e-6", (1e-12, 6e-6), color="grey", fontsize=8)
    axes.set(xlabel="divergence D, nats", ylabel="worst relative error", title=title, ylim=(1e-9, 1e5))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = errors(options.vocab, options.rows, device)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": machine.name(device),
        "backend": resolve_backend(None, device),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "vocab": options.vocab,
        "rows": options.rows,
    }
    (options.out / "accuracy.json").write_text(json.dumps({**about, "results": found}, indent=1) + "\n")
    title = f"fp32 logits, V = {options.vocab}, worst of {options.rows} rows"
    plot(found, options.out / "accuracy.png", title)
    Console().print(f"{options.out / 'accuracy.png'}")


if __name__ == "__main__":
    main()

"""What sharing a vocabulary costs at sizes nobody has here: a model of bytes and latency, and what Gloo does.

    python -m bench.scale [--out DIR] [--measure] [--link nvlink=3e-6,4e11] ...

A link is (α, β): seconds before a message's first byte, bytes per second after it. An all_gather of m bytes a
rank over R ranks by recursive doubling takes ⌈log2 R⌉ α + (R − 1) m/β, an all_reduce of one number
2 ⌈log2 R⌉ α (Thakur, Rabenseifner and Gropp 2005, sections 3 and 4).

Every figure is a prediction but those of --measure, which starts 1, 2 and 4 Gloo processes on this machine.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Bytes a row and rank that `vocab_parallel_div` gathers, collective by collective.
STATE_BYTES = {"forward_kl": (24,), "jeffreys": (32,), "js": (16, 24)}
TENSOR_PARALLEL = (2, 4, 8, 16, 32, 64)
ROWS = (8192, 65536, 1048576)
VOCABULARIES = (128256, 262144)
RANKS = (1, 8, 64, 512, 4096)
HIDDEN = 4096
TOP_K = 64


class Link(NamedTuple):
    latency: float
    bandwidth: float

    def all_gather(self, ranks: int, bytes_each: float) -> float:
        return math.ceil(math.log2(ranks)) * self.latency + (ranks - 1) * bytes_each / self.bandwidth

    def all_reduce_one(self, ranks: int) -> float:
        return 2 * math.ceil(math.log2(ranks)) * self.latency if ranks > 1 else 0.0


class Device(NamedTuple):
    """What one rank computes with, and the model whose step the loss is part of."""

    memory: float = 3.0e12  # bytes a second
    flops: float = 4.0e14
    parameters: float = 8e9

    def loss(self, rows: int, columns: int, ranks: int) -> float:
        """Value and gradient of bf16 logits at 5 U, each rank its share."""
        return 5 * rows * columns * 2 / ranks / self.memory

    def step(self, rows: int, ranks: int) -> float:
        """Forward and backward of the model: 6 operations a parameter and token."""
        return 6 * self.parameters * rows / ranks / self.flops


# Round numbers of data sheets and of small-message tests that others published: inputs, not measurements.
LINKS = {"nvlink": Link(3e-6, 4e11), "infiniband": Link(6e-6, 4.5e10), "gloo": Link(1e-4, 1e9)}


def collectives(link: Link, kind: str, rows: int, ranks: int) -> float:
    return sum(link.all_gather(ranks, size * rows) for size in STATE_BYTES[kind])


def predicted(link: Link, device: Device, kind: str) -> Iterator[tuple[int, int, int, float, float, float]]:
    """TP, N, V, seconds of the collectives, their share of the loss and of the step."""
    for ranks in TENSOR_PARALLEL:
        for rows in ROWS:
            for columns in VOCABULARIES:
                sent = collectives(link, kind, rows, ranks)
                loss = sent + device.loss(rows, columns, ranks)
                yield ranks, rows, columns, sent, sent / loss, sent / (loss + device.step(rows, ranks))


def shipping(columns: int, links: dict[str, Link], device: Device) -> Iterator[tuple[str, float, float]]:
    """What a teacher elsewhere sends, bytes a token, and the seconds a token of making its logits again."""
    head = 2 * HIDDEN * columns / device.flops
    yield "full logits, bf16", 2 * columns, 0.0
    yield f"hidden states, bf16, H = {HIDDEN}, logits made again", 2 * HIDDEN, head
    yield f"top {TOP_K}: int32 ids, float32 log-probabilities", TOP_K * 8, 0.0
    yield "tokens only, the teacher run beside the student", 4, 2 * device.parameters / device.flops


def report(links: dict[str, Link], device: Device) -> None:
    for name, link in links.items():
        print(f"\npredicted, {name}: α = {link.latency:g} s, β = {link.bandwidth:g} bytes/s; ", end="")
        print(f"forward_kl, bf16, {device.memory:g} bytes/s of memory, a model of {device.parameters:g}")
        print("  TP        N       V   collective   of the loss   of the step")
        for ranks, rows, columns, sent, of_loss, of_step in predicted(link, device, "forward_kl"):
            times = f"{sent * 1e3:9.3f} ms      {of_loss:6.1%}        {of_step:6.2%}"
            print(f"{ranks:4d} {rows:8d} {columns:7d} {times}")
        counts = ", ".join(f"{ranks} ranks {link.all_reduce_one(ranks) * 1e6:.0f} µs" for ranks in RANKS)
        print(f"  the count of rows, once a step: {counts}")
    columns = VOCABULARIES[0]
    print(f"\npredicted: a teacher's token, V = {columns}")
    for what, size, again in shipping(columns, links, device):
        times = ", ".join(f"{name} {size / link.bandwidth * 1e6:.3g} µs" for name, link in links.items())
        made = f"; computed again: {again * 1e6:.3g} µs" if again else ""
        print(f"  {what}: {size:.0f} bytes; {times}{made}")


def plot(links: dict[str, Link], device: Device, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, rows in zip(figure.subplots(1, 2, sharey=True), (ROWS[0], ROWS[-1]), strict=True):
        for name, link in links.items():
            shares = [
                s
                for r, n, v, _, _, s in predicted(link, device, "forward_kl")
                if (n, v) == (rows, VOCABULARIES[0])
            ]
            axes.plot(TENSOR_PARALLEL, shares, "o-", label=name)
        axes.set(
            title=f"predicted, N = {rows}, V = {VOCABULARIES[0]}", xlabel="ranks that share the vocabulary",
            ylabel="share of the step", xscale="log", yscale="log",
        )  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _link(text: str) -> tuple[str, Link]:
    name, _, numbers = text.partition("=")
    latency, bandwidth = map(float, numbers.split(","))
    return name, Link(latency, bandwidth)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--link", metavar="NAME=α,β", type=_link, action="append", default=[])
    parser.add_argument("--memory", type=float, default=Device().memory, help="bytes a second of a rank")
    parser.add_argument("--flops", type=float, default=Device().flops, help="operations a second of a rank")
    parser.add_argument("--parameters", type=float, default=Device().parameters, help="of the model")
    parser.add_argument("--out", type=Path, help="folder for the plot")
    parser.add_argument("--measure", action="store_true", help="1, 2 and 4 Gloo processes on this machine")
    args = parser.parse_args()
    links, device = LINKS | dict(args.link), Device(args.memory, args.flops, args.parameters)
    report(links, device)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        plot(links, device, args.out / "scale.png")
        print(args.out / "scale.png")
    if args.measure:
        from .scale_measured import measure

        measure()


if __name__ == "__main__":
    main()

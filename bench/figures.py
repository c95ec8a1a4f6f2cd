"""The pictures of README and docs/, from stored results: nothing is measured here.

Each is written twice, for light and dark pages: NAME-light.svg and NAME-dark.svg, with a transparent ground.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .diagrams import package, sweep

_ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = _ROOT / "bench" / "results", _ROOT / "docs" / "figures"


class Theme(NamedTuple):
    """Colours that can be told apart on a page of this brightness."""

    ink: str
    faint: str
    ours: str
    compiled: str
    plain: str
    others: tuple[str, ...]


# Theme, the folder of stored results, and the file to write.
Picture = Callable[[Theme, Path, Path], None]

THEMES = {
    "light": Theme(
        "#24292f", "#b9c0c8", "#0b57a4", "#c77800", "#b3261e", ("#5b8fc7", "#3c8d6e", "#7c5fb0", "#8a8f98")
    ),
    "dark": Theme(
        "#d6dbe1", "#4a525c", "#7ab7f0", "#f0b35a", "#ff8a80", ("#5d93c9", "#6cc5a1", "#b59ae6", "#9aa2ad")
    ),
}


def _axes(theme: Theme, size: tuple[float, float], panels: int = 1) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Text stays text: small files, and letters that a reader can select. A fixed salt: the same bytes again.
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kl_gpu",
        "font.family": "sans-serif",
        "font.size": 11,
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.ink)
    style |= {"axes.edgecolor": theme.faint, "grid.color": theme.faint, "grid.linewidth": 0.5}
    pyplot.rcParams.update(style)
    figure, grid = pyplot.subplots(1, panels, figsize=size, squeeze=False)
    for axes in grid[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_facecolor("none")
    return figure, list(grid[0])


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def accuracy(theme: Theme, results: Path, path: Path) -> None:
    """Worst relative error against the size of the divergence."""
    from .accuracy import BASELINES, RELATIVE

    rows = json.loads((results / "accuracy.json").read_text())["results"]
    figure, (axes,) = _axes(theme, (7.6, 4.4))
    for system, kind, label, style in (
        ("torch", "forward_kl", BASELINES["forward_kl"], {"color": theme.plain, "linewidth": 2}),
        ("torch", "js", BASELINES["js"], {"color": theme.compiled, "linewidth": 2, "linestyle": "--"}),
        ("kl_gpu", "forward_kl", "kl_gpu forward_kl", {"color": theme.ours, "linewidth": 2}),
        ("kl_gpu", "reverse_kl", "kl_gpu reverse_kl", {"color": theme.others[0], "linewidth": 1.2}),
        ("kl_gpu", "js", "kl_gpu js", {"color": theme.others[1], "linewidth": 1.2}),
        ("kl_gpu", "skew_forward_kl", "kl_gpu jeffreys, skew", {"color": theme.others[2], "linewidth": 1.2}),
        ("kl_gpu", "skew_reverse_kl", None, {"color": theme.others[2], "linewidth": 1.2}),
        ("kl_gpu", "jeffreys", None, {"color": theme.others[2], "linewidth": 1.2}),
    ):
        line = [
            (row["D"], row["max_rel_error"]) for row in rows if (row["system"], row["kind"]) == (system, kind)
        ]
        axes.loglog(*zip(*sorted(line), strict=True), label=label, **style)
    axes.axhline(RELATIVE, color=theme.ink, linewidth=0.8, linestyle=":")
    axes.annotate("guaranteed: 5e-6", (7e-13, 7e-6), color=theme.ink, fontsize=9)
    axes.set(xlabel="divergence D, nats", ylabel="worst relative error", ylim=(1e-8, 1e6))
    axes.grid(alpha=0.6)
    axes.legend(fontsize=9, frameon=False, loc="upper right")
    _save(figure, path)


def training_step(theme: Theme, results: Path, path: Path) -> None:
    """Loss and gradient of a training step: processor time at the widest vocabulary, two threads."""
    record = json.loads((results / "cpu_steps.json").read_text())
    systems = {"plain PyTorch": theme.plain, "torch.compile": theme.compiled, "kl_div": theme.ours}
    figure, panels = _axes(theme, (7.6, 2.3), 2)
    for axes, dtype in zip(panels, ("fp32", "bf16"), strict=True):
        chosen = {
            row["system"]: row["cpu_ms"]
            for row in record["found"]
            if (row["dtype"], row["columns"], row["threads"]) == (dtype, 128256, 2)
        }
        times = [chosen[system] for system in systems]
        names = ["kl_gpu" if system == "kl_div" else system for system in systems]
        bars = axes.barh(names, times, color=list(systems.values()), height=0.62)
        axes.bar_label(bars, [f"{x:.0f} ms" for x in times], padding=4, color=theme.ink, fontsize=10)
        axes.set_title(dtype, fontsize=11, color=theme.ink)
        axes.set(xlim=(0, 1.28 * max(times)), xticks=[])
        axes.spines[["bottom"]].set_visible(False)
        axes.tick_params(length=0)
    panels[1].set_yticklabels([])
    _save(figure, path)


def entry_memory(theme: Theme, results: Path, path: Path) -> None:
    """Peak memory of each function beyond its inputs, in tensors of logits."""
    found = json.loads((results / "entry_memory.json").read_text())["found"]
    functions = list(dict.fromkeys(row["function"] for row in found))
    colours = {"kl_gpu": theme.ours, "torch.compile": theme.compiled, "plain PyTorch": theme.plain}
    figure, (axes,) = _axes(theme, (7.6, 4.2))
    for place, (system, colour) in enumerate(colours.items()):
        sizes = {row["function"]: row["tensors_of_logits"] for row in found if row["system"] == system}
        at = [i + 0.27 * (place - 1) for i in range(len(functions))]
        bars = axes.barh(at, [sizes[name] for name in functions], height=0.25, color=colour, label=system)
        labels = [f"{sizes[name]:.1f}" for name in functions]
        axes.bar_label(bars, labels, padding=4, color=theme.ink, fontsize=9)
    axes.set_yticks(range(len(functions)), functions)
    axes.invert_yaxis()
    axes.set(xlabel="peak memory beyond the inputs, in tensors of logits", xlim=(0, 10))
    axes.tick_params(axis="y", length=0)
    axes.legend(fontsize=10, frameon=False, loc="lower right")
    _save(figure, path)


def linear_memory(theme: Theme, results: Path, path: Path) -> None:
    """Peak memory of linear_div beyond inputs and gradients, against the number of rows."""
    record = json.loads((results / "linear_memory.json").read_text())
    colours = {"plain PyTorch": theme.plain, "torch.compile": theme.compiled, "kl_gpu": theme.ours}
    figure, (axes,) = _axes(theme, (7.6, 3.6))
    for system, colour in colours.items():
        line = [(x["rows"], x["peak_extra_bytes"] / 2**20) for x in record["found"] if x["system"] == system]
        rows, memory = zip(*sorted(line), strict=True)
        label = "kl_gpu linear_div" if system == "kl_gpu" else system
        axes.plot(rows, memory, "o-", color=colour, linewidth=2, markersize=4)
        axes.annotate(
            label, (rows[-1], memory[-1]), (6, 0), textcoords="offset points", color=colour, va="center"
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({x["rows"] for x in record["found"]})
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.minorticks_off()
    axes.set(xlim=(ticks[0] * 0.9, ticks[-1] * 2.6), ylim=(0, None))
    axes.set(xlabel="tokens N", ylabel="MiB beyond inputs and gradients")
    axes.grid(axis="y", alpha=0.6)
    _save(figure, path)


def _diagram(draw: Callable[[Any], str]) -> Picture:
    def write(theme: Theme, results: Path, path: Path) -> None:
        path.write_text(draw(theme))

    return write


PICTURES: dict[str, Picture] = {
    "accuracy": accuracy,
    "training-step": training_step,
    "entry-memory": entry_memory,
    "linear-memory": linear_memory,
    "sweep": _diagram(sweep),
    "package": _diagram(package),
}


def draw(folder: Path, results: Path = RESULTS, names: Sequence[str] = tuple(PICTURES)) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names:
        for shade, theme in THEMES.items():
            paths.append(folder / f"{name}-{shade}.svg")
            PICTURES[name](theme, results, paths[-1])
    return paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=FIGURES, metavar="DIR")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    for path in draw(options.out):
        print(path)
    return 0

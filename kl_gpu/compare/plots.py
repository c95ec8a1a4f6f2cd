"""The report's pictures, as SVG text."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from .figures import mean
from .run import Comparison

# Colours that the colour-blind tell apart (Okabe and Ito), for up to seven models.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#666666")
_LEAST = 1e-9


def pictures(comparison: Comparison) -> dict[str, str]:
    """SVG by title. Without matplotlib there are none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return {}
    drawn = {
        "How the KL of the tokens is distributed": _distribution,
        "KL against the base's entropy": _against_entropy,
        "KL by position in the window": _by_position,
    }
    if len(comparison.models) > 1 and all(model.nbytes for model in comparison.models):
        drawn["Size against mean KL"] = _against_size
    found = {}
    for title, draw in drawn.items():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, comparison)
        if len(comparison.models) > 1 and draw is not _against_size:
            axes.legend(frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True)
        # Without its XML prologue it stands in a page as it is.
        found[title] = out.getvalue()[out.getvalue().index("<svg") :]
    return found


def _each(comparison: Comparison) -> list[tuple[str, str, Any]]:
    return [
        (model.name, _COLOURS[i % len(_COLOURS)], model.tokens["forward_kl"].double().numpy())
        for i, model in enumerate(comparison.models)
    ]


def _distribution(axes: Any, comparison: Comparison) -> None:
    for name, colour, kl in _each(comparison):
        shown = np.clip(kl[np.isfinite(kl)], _LEAST, None)
        if not len(shown):
            continue
        edges = np.geomspace(shown.min(), max(shown.max(), shown.min() * 1.01), 60)
        axes.hist(shown, edges, histtype="step", color=colour, label=name)
    axes.set(xscale="log", xlabel="KL(base‖model), nats", ylabel="tokens")


def _against_entropy(axes: Any, comparison: Comparison) -> None:
    for i, (name, colour, kl) in enumerate(_each(comparison)):
        entropy = comparison.models[i].tokens["base_entropy"].numpy()
        # A sample, so that the page stays small.
        step = max(1, len(kl) // 2000)
        axes.scatter(
            entropy[::step],
            np.clip(kl[::step], _LEAST, None),
            3,
            colour,
            alpha=0.5,
            label=name,
            rasterized=True,
        )
    axes.set(yscale="log", xlabel="entropy of the base, nats", ylabel="KL, nats")


def _by_position(axes: Any, comparison: Comparison) -> None:
    rows, first = comparison.windows.rows, comparison.windows.first
    place, window = comparison.place_of.numpy() - 1 - first, comparison.window_of.numpy()
    parts = np.array_split(np.arange(rows), min(16, rows))
    for name, colour, kl in _each(comparison):
        # A part that no token counts in is not drawn.
        some = [(part, (place >= part[0]) & (place <= part[-1])) for part in parts]
        some = [(part, which) for part, which in some if which.any()]
        middle = [first + part.mean() for part, _ in some]
        of = [mean(kl[which], window[which]) for _, which in some]
        axes.errorbar(
            middle, [x.value for x in of], [x.error for x in of], color=colour, label=name, capsize=2, lw=1
        )
    axes.set(xlabel="position in the window", ylabel="mean KL, nats")
    if len(comparison.models) > 1:
        # Beside a model that is far off one that is close would be a line at 0.
        axes.set_yscale("log", nonpositive="clip")
    else:
        axes.set_ylim(0, None)


def _against_size(axes: Any, comparison: Comparison) -> None:
    window = comparison.window_of.numpy()
    for i, (name, colour, kl) in enumerate(_each(comparison)):
        of, size = mean(kl, window), (comparison.models[i].nbytes or 0) / 2**20
        axes.errorbar(size, of.value, of.error, color=colour, marker="o", capsize=3)
        axes.annotate(name, (size, of.value), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(yscale="log", xlabel="weights, MiB", ylabel="mean KL, nats")

"""From numbers of each token to the figures of a report, with their errors.

Tokens of one window are not independent, so the standard error of a mean is taken over windows: with the
window's sums r of the deviations, √(G/(G−1) Σ r²)/n for G windows and n tokens (a cluster-robust variance;
Cameron and Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015, equation 11 for a mean).
Errors of functions of means are of first order. Figures that llama.cpp's perplexity tool prints have its
names and its definitions but for that.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .run import Comparison, Scores

Numbers = NDArray[np.float64]


class Figure(NamedTuple):
    """One line of the table.

    Attributes:
        section: the heading it stands under.
        name: what it is.
        value: NaN where it is not known.
        error: its standard error, over windows; None where it has none.
        token_error: what it would be if tokens were independent.
        percent: whether it is shown as a percentage.
    """

    section: str
    name: str
    value: float
    error: float | None = None
    token_error: float | None = None
    percent: bool = False


class Mean(NamedTuple):
    value: float
    error: float
    token_error: float

    def times(self, factor: float) -> Mean:
        return Mean(*(factor * x for x in self))


def mean(x: Numbers, window: NDArray[np.int64]) -> Mean:
    """A mean, its error over windows, and what its error would be if tokens were independent."""
    n, value = len(x), float(x.mean()) if len(x) else math.nan
    return Mean(
        value, _clustered(x - value, window), float(x.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    )


def _clustered(deviation: Numbers, window: NDArray[np.int64]) -> float:
    sums = np.bincount(window, deviation)[np.bincount(window) > 0]
    groups = len(sums)
    if groups < 2:
        return math.nan
    return math.sqrt(groups / (groups - 1) * float(np.square(sums).sum())) / len(deviation)


_PERPLEXITY, _KL, _P, _OTHERS = (
    "Perplexity statistics", "KL divergence statistics", "Token probability statistics", "Other divergences",
)  # fmt: skip
_KL_PERCENTS = (
    (99.9, "99.9%"), (99, "99.0%"), (95, "95.0%"), (90, "90.0%"), (50, "Median"), (10, "10.0%"), (5, "5.0%"),
    (1, "1.0%"), (0.1, "0.1%"),
)  # fmt: skip
_P_PERCENTS = (
    *_KL_PERCENTS[:4],
    (75, "75.0%"),
    (50, "Median"),
    (25, "25.0%"),
    *_KL_PERCENTS[5:],
)


def figures(scores: Scores, window: NDArray[np.int64]) -> list[Figure]:
    """All figures of one model against the base."""
    of = {name: x.double().numpy() for name, x in scores.tokens.items() if x.dim() == 1}
    base, model, kl = -of["base_logprob"], -of["logprob"], of["forward_kl"]
    return [
        *_perplexities(base, model, window),
        *_named(_KL, "KLD", kl, mean(kl, window), _KL_PERCENTS),
        *_probabilities(np.exp(-model) - np.exp(-base), of["same_top"], window),
        *(
            Figure(_OTHERS, name, *mean(x, window), percent)
            for name, x, percent in (
                ("Mean    reverse KL", of["reverse_kl"], False), ("Mean    JS", of["js"], False),
                ("Mean    acceptance (1 - TV)", of["acceptance"], True),
                ("Top-5 agreement", of["top5"], True),
                ("Mean    base entropy", of["base_entropy"], False),
                ("Mean    entropy", of["entropy"], False),
            )
        ),
        Figure(_OTHERS, "Tokens", float(len(kl))),
        Figure(_OTHERS, "Tokens with a NaN or an infinity", float((~np.isfinite(kl) |
        ~np.isfinite(model)).sum())),
    ]  # fmt: skip


def _perplexities(base: Numbers, model: Numbers, window: NDArray[np.int64]) -> list[Figure]:
    """Perplexities are exp of the mean of −log p of the tokens that came."""
    ppl, base_ppl, ratio = (math.exp(x.mean()) for x in (model, base, model - base))
    log_ratio = mean(model - base, window)
    # To first order what a token adds to the difference of the perplexities.
    difference = mean(ppl * (model - model.mean()) - base_ppl * (base - base.mean()), window)
    pairs = (
        ("Mean PPL(Q)", mean(model, window).times(ppl)._replace(value=ppl)),
        ("Mean PPL(base)", mean(base, window).times(base_ppl)._replace(value=base_ppl)),
        ("Mean ln(PPL(Q)/PPL(base))", log_ratio),
        ("Mean PPL(Q)/PPL(base)", log_ratio.times(ratio)._replace(value=ratio)),
        ("Mean PPL(Q)-PPL(base)", difference._replace(value=ppl - base_ppl)),
    )
    found = [Figure(_PERPLEXITY, name, *each) for name, each in pairs]
    spread = base.std() * model.std()
    correlation = (
        float(np.mean((base - base.mean()) * (model - model.mean())) / spread) if spread else math.nan
    )
    found.insert(2, Figure(_PERPLEXITY, "Cor(ln(PPL(Q)), ln(PPL(base)))", correlation, percent=True))
    return found


def _named(
    section: str,
    what: str,
    x: Numbers,
    mean: Mean,
    percents: tuple[tuple[float, str], ...],
    percent: bool = False,
) -> list[Figure]:
    """Mean, extremes and percentiles, linear between two, a median of an even number halfway."""
    known = not np.isnan(x).any()
    at = (
        np.percentile(x, [100, *(p for p, _ in percents), 0])
        if known
        else np.full(len(percents) + 2, math.nan)
    )
    names = ("Maximum", *(name for _, name in percents), "Minimum")
    return [
        Figure(section, f"Mean    {what}", *mean, percent),
        *(
            Figure(section, f"{name:7} {what}", float(value), percent=percent)
            for name, value in zip(names, at, strict=True)
        ),
    ]


def _probabilities(delta: Numbers, same_top: Numbers, window: NDArray[np.int64]) -> list[Figure]:
    """Δp is what the model gives the token that came, less what the base gives it."""
    square = mean(np.square(delta), window)
    rms = math.sqrt(square.value)
    of_rms = square.times(0.5 / rms if rms else 0.0)._replace(value=rms)
    return [
        *_named(_P, "Δp", delta, mean(delta, window), _P_PERCENTS, percent=True),
        Figure(_P, "RMS Δp", *of_rms, True),
        Figure(_P, "Same top p", *mean(same_top, window), True),
    ]


# Where the base's likeliest token has a probability between two of these.
CONFIDENCE = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_POSITIONS = 8


def buckets(comparison: Comparison, scores: Scores) -> dict[str, list[tuple[str, int, float, float]]]:
    """Mean KL by the base's confidence, position in the window, category: (name, tokens, mean, error)."""
    window, kl = comparison.window_of.numpy(), scores.tokens["forward_kl"].double().numpy()
    rows, first = comparison.windows.rows, comparison.windows.first
    place = comparison.place_of.numpy() - 1
    top = scores.tokens["base_top_p"].double().numpy()
    edges = np.array(CONFIDENCE[1:-1])
    names = [f"{low:g} to {high:g}" for low, high in pairwise(CONFIDENCE)]
    found = {"confidence": _by(np.digitize(top, edges), names, kl, window)}
    bins = min(_POSITIONS, rows)
    bounds = [first + i * rows // bins for i in range(bins + 1)]
    names = [f"{low} to {high - 1}" for low, high in pairwise(bounds)]
    found["position"] = _by(np.digitize(place, bounds[1:-1]), names, kl, window)
    categories = comparison.windows.categories
    if categories is not None:
        names, index = np.unique(categories, return_inverse=True)  # type: ignore[assignment]
        found["category"] = _by(index[window], [str(x) for x in names], kl, window)
    return found


def _by(
    index: NDArray[np.int64], names: list[str], kl: Numbers, window: NDArray[np.int64]
) -> list[tuple[str, int, float, float]]:
    found = []
    for i, name in enumerate(names):
        some = index == i
        of = mean(kl[some], window[some])
        found.append((name, int(some.sum()), of.value, of.error))
    return found


def differences(comparison: Comparison) -> list[tuple[str, str, float, float]]:
    """(first, second, mean of KL(first) − KL(second) at each token, its error) of every two models."""
    window, models = comparison.window_of.numpy(), comparison.models
    found = []
    for i, first in enumerate(models):
        for second in models[i + 1 :]:
            apart = first.tokens["forward_kl"].double() - second.tokens["forward_kl"].double()
            of = mean(apart.numpy(), window)
            found.append((first.name, second.name, of.value, of.error))
    return found

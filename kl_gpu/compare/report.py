"""What people look at: a table for the terminal and for Markdown, JSON, and a page that needs no network."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ComparisonError
from .figures import Figure, buckets, differences, figures
from .plots import pictures
from .run import Comparison, Scores

# Tokens shown as text, and how many of the worst are shown with what stands before them.
_SHOWN, _WORST, _BEFORE = 2000, 25, 24
Decode = Callable[[int], str]


def record(comparison: Comparison) -> dict[str, Any]:
    """Every figure of the report, for JSON; an unknown one is None."""
    window = comparison.window_of.numpy()
    models = []
    for scores in comparison.models:
        table = [
            {"section": x.section, "name": " ".join(x.name.split()), "value": x.value, "error": x.error,
             "error_if_tokens_were_independent": x.token_error}
            for x in figures(scores, window)
        ]  # fmt: skip
        groups = {
            key: [dict(zip(("name", "tokens", "mean_kl", "error"), row, strict=True)) for row in rows]
            for key, rows in buckets(comparison, scores).items()
        }
        models.append({"model": scores.name, "bytes": scores.nbytes, "figures": table, "mean_kl_by": groups})
    pairs = [
        dict(zip(("first", "second", "mean_difference_of_kl", "error"), row, strict=True))
        for row in differences(comparison)
    ]
    found = {
        "base": comparison.base,
        "about": comparison.about,
        "notes": comparison.notes,
        "models": models,
        "differences": pairs,
    }
    return dict(_without_nan(found))


def _without_nan(x: Any) -> Any:
    """JSON has neither NaN nor infinities: the one is null, the others are words."""
    if isinstance(x, dict):
        return {key: _without_nan(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_without_nan(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else str(x)
    return x


def shown(x: Figure) -> str:
    """A figure and its error as the table has them."""
    if math.isnan(x.value):
        return "unknown"
    if x.name.startswith("Tokens"):
        return f"{x.value:.0f}"
    factor, unit = (100, " %") if x.percent else (1, "")
    text = _digits(factor * x.value, x.percent)
    if x.error is not None and not math.isnan(x.error):
        text += f" ± {_digits(factor * x.error, x.percent)}"
    return text + unit


def _digits(x: float, percent: bool) -> str:
    places = 3 if percent else 6
    # A model that was barely changed lies far below what llama.cpp's digits show.
    return f"{x:.2e}" if 0 < abs(x) < 10.0 ** (1 - places) else f"{x:.{places}f}"


def sections(comparison: Comparison) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """(heading, [(name, a cell for each model)])."""
    window = comparison.window_of.numpy()
    tables = [figures(scores, window) for scores in comparison.models]
    found: list[tuple[str, list[tuple[str, list[str]]]]] = []
    for row in zip(*tables, strict=True):
        if not found or found[-1][0] != row[0].section:
            found.append((row[0].section, []))
        found[-1][1].append((row[0].name, [shown(x) for x in row]))
    for key in buckets(comparison, comparison.models[0]):
        each = [buckets(comparison, scores)[key] for scores in comparison.models]
        rows = [
            (f"{of[0][0]} ({of[0][1]} tokens)", [shown(Figure("", "", x[2], x[3])) for x in of])
            for of in zip(*each, strict=True)
        ]
        found.append((f"Mean KL by {_WORDS[key]}", rows))
    return found


_WORDS = {
    "confidence": "the base's largest probability",
    "position": "position in the window",
    "category": "category",
}


def error_note(comparison: Comparison) -> str:
    """How far the errors of independent tokens would be off."""
    if len(comparison.windows.ids) == 1:
        return "With one window there are no errors: they are taken over windows."
    window = comparison.window_of.numpy()
    ratios = []
    for scores in comparison.models:
        of = next(x for x in figures(scores, window) if x.name == "Mean    KLD")
        if of.error and of.token_error and math.isfinite(of.error):
            ratios.append(f"{of.error / of.token_error:.1f}")
    note = (
        f"Errors are taken over {len(comparison.windows.ids)} windows: a window's tokens depend on each other"
    )
    if not ratios:
        return f"{note}."
    return f"{note}. For mean KLD that makes them {', '.join(ratios)} times what they would be over tokens."


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know of the figures."""
    return [*comparison.notes, error_note(comparison)]


def markdown(comparison: Comparison) -> str:
    names = [scores.name for scores in comparison.models]
    lines = [f"# {', '.join(names)} against {comparison.base}", ""]
    lines += [line for note in notes(comparison) for line in (note, "")]
    for heading, rows in sections(comparison):
        lines += [f"## {heading}", "", f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        lines += [f"| {' '.join(name.split())} | {' | '.join(cells)} |" for name, cells in rows]
        lines.append("")
    pairs = differences(comparison)
    if pairs:
        lines += [
            "## Difference of mean KL, token by token",
            "",
            "| first | second | first − second |",
            "|---|---|---|",
        ]
        lines += [f"| {a} | {b} | {shown(Figure('', '', value, error))} |" for a, b, value, error in pairs]
    return "\n".join(lines).rstrip() + "\n"


def page(comparison: Comparison, decode: Decode | None) -> str:
    """The whole report as one HTML file: style, script and pictures are inside.

    Args:
        decode: a token's text; without it the page has no text view.
    """
    names = [scores.name for scores in comparison.models]
    title = f"{', '.join(names)} against {comparison.base}"
    parts = [f"<h1>{_text(title)}</h1>", *(f"<p>{_text(note)}</p>" for note in notes(comparison))]
    drawn = [
        f"<figure><figcaption>{_text(heading)}</figcaption>{svg}</figure>"
        for heading, svg in pictures(comparison).items()
    ]
    parts += ['<div id="pictures">', *drawn, "</div>"] if drawn else []
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in names)
    for heading, rows in sections(comparison):
        body = "".join(f'<tr><th scope="row">{_text(name)}</th>{_cells(cells)}</tr>' for name, cells in rows)
        table = (
            f"<caption>{_text(heading)}</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>"
        )
        parts.append(f"<table>{table}</table>")
    if decode is not None:
        parts.append(_text_view(comparison, decode))
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return template.replace("{{title}}", _text(title)).replace("{{body}}", "\n".join(parts))


def _cells(cells: list[str]) -> str:
    return "".join(f"<td>{_text(cell)}</td>" for cell in cells)


def _text(x: str) -> str:
    return html.escape(x)


def _text_view(comparison: Comparison, decode: Decode) -> str:
    """The first tokens, and the worst ones in context, as data that the page's script shows."""
    words: dict[int, str] = {}

    def word(token: int) -> str:
        if token not in words:
            words[token] = decode(token)
        return words[token]

    window = comparison.window_of[:_SHOWN]
    labels, count = comparison.windows.ids[window, comparison.place_of[:_SHOWN]], len(window)
    data = {
        # Where a window begins.
        "starts": [i for i in range(1, count) if window[i] != window[i - 1]],
        "tokens": [word(int(x)) for x in labels],
        "base": _tops(comparison.models[0], "base_top", count, word),
        "models": [
            {
                "name": scores.name,
                "kl": _numbers(scores.tokens["forward_kl"][:count]),
                "top": _tops(scores, "top", count, word),
                "worst": _worst(comparison, scores, word),
            }
            for scores in comparison.models
        ],
    }
    # A "</script>" in the text must not end the script.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return (
        '<section id="text"><h2>The text, coloured by KL</h2>'
        '<p><label>Model <select id="model"></select></label> '
        "Arrow keys go from token to token; each shows both models' five likeliest.</p>"
        '<div id="legend"></div><div id="tokens"></div><h2>The worst tokens</h2><ol id="worst"></ol>'
        '<div id="card" role="status"></div></section>'
        f'<script type="application/json" id="data">{text}</script>'
    )


def _numbers(x: Any) -> list[float | None]:
    return [float(f"{v:.3g}") if math.isfinite(v) else None for v in x.tolist()]


def _tops(scores: Scores, key: str, count: int, word: Decode) -> list[list[tuple[str, float | None]]]:
    ids, logprobs = scores.tokens[key][:count].tolist(), scores.tokens[f"{key}_logprob"][:count].exp()
    return [
        [(word(token), p) for token, p in zip(row, _numbers(each), strict=True)]
        for row, each in zip(ids, logprobs, strict=True)
    ]


def _worst(comparison: Comparison, scores: Scores, word: Decode) -> list[dict[str, Any]]:
    kl = np.nan_to_num(scores.tokens["forward_kl"].numpy(), nan=np.inf)
    found = []
    for at in np.argsort(-kl, kind="stable")[:_WORST].tolist():
        window, place = int(comparison.window_of[at]), int(comparison.place_of[at])
        before = comparison.windows.ids[window, max(0, place - _BEFORE) : place].tolist()
        token = int(comparison.windows.ids[window, place])
        found.append(
            {
                "kl": _numbers(scores.tokens["forward_kl"][at : at + 1])[0],
                "before": "".join(word(x) for x in before),
                "token": word(token),
                "base": _tops_at(scores, "base_top", at, word),
                "top": _tops_at(scores, "top", at, word),
            }
        )
    return found


def _tops_at(scores: Scores, key: str, at: int, word: Decode) -> list[tuple[str, float | None]]:
    ids, logprobs = scores.tokens[key][at].tolist(), scores.tokens[f"{key}_logprob"][at].exp()
    return [(word(token), p) for token, p in zip(ids, _numbers(logprobs), strict=True)]


def write(comparison: Comparison, out: Path, decode: Decode | None) -> Path:
    """report.html, report.md and report.json in a folder; the page's path.

    Raises:
        ComparisonError: they cannot be written.
    """
    found = {
        "report.json": json.dumps(record(comparison), indent=1, ensure_ascii=False) + "\n",
        "report.md": markdown(comparison),
        "report.html": page(comparison, decode),
    }
    try:
        for name, text in found.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ComparisonError(f"{out}: {error.strerror or error}") from None
    return out / "report.html"

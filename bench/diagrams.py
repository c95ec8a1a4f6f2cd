"""Two drawings of the documentation as SVG: the one-pass sweep, and what a call goes through."""

from __future__ import annotations

from html import escape
from typing import Protocol


class Colours(Protocol):
    @property
    def ink(self) -> str: ...
    @property
    def faint(self) -> str: ...
    @property
    def ours(self) -> str: ...
    @property
    def compiled(self) -> str: ...


def _text(
    x: float, y: float, words: str, colour: str, size: int = 14, anchor: str = "middle", more: str = ""
) -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"{more}>'
        f"{escape(words)}</text>"
    )


def _box(
    x: float, y: float, width: float, height: float, lines: list[str], theme: Colours, strong: bool = False
) -> str:
    """A rounded box, its first line in bold."""
    stroke = theme.ours if strong else theme.faint
    found = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="none" stroke="{stroke}" '
        f'stroke-width="{2 if strong else 1.5}"/>'
    ]
    top = y + height / 2 - 9 * (len(lines) - 1) + 5
    for i, line in enumerate(lines):
        bold = ' font-weight="600"' if i == 0 else ""
        found.append(_text(x + width / 2, top + 18 * i, line, theme.ink, 14 if i == 0 else 12, more=bold))
    return "".join(found)


def _arrow(x1: float, y1: float, x2: float, y2: float, theme: Colours) -> str:
    return (
        f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{theme.ink}" stroke-width="1.5" marker-end="url(#head)"/>'
    )


def _page(width: int, height: int, parts: list[str], theme: Colours) -> str:
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0 0 L8 4 L0 8 Z" fill="{theme.ink}"/></marker></defs>'
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="sans-serif">{head}\n{body}\n</svg>\n'
    )


def sweep(theme: Colours) -> str:
    """The KL of a row in one read, and its gradient from cache."""
    parts = []
    for y, name in ((20, "teacher"), (58, "student")):
        parts.append(_text(76, y + 20, name, theme.ink, 13, "end"))
        for i in range(8):
            here = i == 3
            fill = f'fill="{theme.ours}" fill-opacity="0.25"' if here else 'fill="none"'
            stroke = theme.ours if here else theme.faint
            parts.append(f'<rect x="{86 + 58 * i}" y="{y}" width="54" height="28" {fill} stroke="{stroke}"/>')
    parts.append(_text(318, 12, "logits of one row, tile by tile, each read once", theme.ink, 12))
    parts.append(_text(562, 58, "…", theme.ink, 20, "start"))
    parts.append(_arrow(287, 90, 287, 122, theme))
    parts.append(_text(298, 110, "d = s − t,  w = e^(t − m),  x = d − c", theme.ink, 12, "start"))
    parts.append(
        _box(
            86,
            126,
            460,
            66,
            ["five numbers per row", "m, c   and   Z = Σ w,  A1 = Σ w x,  A2 = Σ w (eˣ − 1 − x) ≥ 0"],
            theme,
            True,
        )
    )
    parts.append(_text(566, 148, "a tile with a larger logit", theme.ink, 12, "start"))
    parts.append(_text(566, 164, "moves m and c; parts of a", theme.ink, 12, "start"))
    parts.append(_text(566, 180, "row merge by the same rule", theme.ink, 12, "start"))
    parts.append(_arrow(200, 196, 200, 228, theme))
    parts.append(_box(86, 232, 228, 62, ["value", "KL = A2/Z + log1p(y) − y"], theme))
    parts.append(_arrow(430, 196, 430, 228, theme))
    parts.append(_box(334, 232, 212, 62, ["gradient", "q − p, from the row in cache"], theme))
    return _page(740, 306, parts, theme)


def package(theme: Colours) -> str:
    """What a call goes through, from the public functions to a backend."""
    parts = [
        _box(
            20,
            14,
            700,
            46,
            ["kl_div, divergence, topk_div, token_stats, linear_div, vocab_parallel_div, …"],
            theme,
            True,
        ),
        _arrow(370, 62, 370, 84, theme),
        _box(20, 88, 340, 62, ["arguments", "validation, masks, labels, reductions"], theme),
        _box(
            380,
            88,
            340,
            62,
            ["autograd, torch.compile, torch.func", "one node, one set of saved row numbers"],
            theme,
        ),
        _arrow(370, 152, 370, 176, theme),
        _box(
            20,
            180,
            700,
            62,
            ["operators (torch.ops.kl_gpu)", "rows as views [A, B, V]; masks and reductions are gone"],
            theme,
        ),
        _arrow(130, 244, 130, 276, theme),
        _arrow(370, 244, 370, 276, theme),
        _arrow(610, 244, 610, 276, theme),
        _box(20, 280, 220, 62, ["triton", "GPU kernels"], theme, True),
        _box(260, 280, 220, 62, ["native", "C++ kernels for the CPU"], theme, True),
        _box(500, 280, 220, 62, ["eager", "plain PyTorch, any device"], theme, True),
        _text(
            370,
            372,
            "Each backend is tested against the same specification: NumPy in float64.",
            theme.ink,
            12,
        ),
    ]
    return _page(740, 386, parts, theme)

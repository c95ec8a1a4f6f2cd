"""Rows of logits like those of trained models: a few tops far above a broad floor, not a bell curve.

Gaussian logits have no token that outweighs the others, so they never try what a kernel does when a row's
mass turns up late, differs between the sides, or is cut off. `FAMILIES` draws rows that do; `SmallModel` is a
language model trained within seconds on Python's own library, to be compared with its own quantised copies.

Every family takes (rows, vocab, generator) and returns (student, teacher), float32 `[rows, vocab]` on the
CPU, in nats before any temperature. The same generator state gives the same rows.
"""

from __future__ import annotations

import math
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Pair = tuple[Tensor, Tensor]
Family = Callable[[int, int, Generator], Pair]

INF = math.inf


def _uniform(low: float, high: float, *shape: int, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def tops_on_a_floor(rows: int, vocab: int, generator: Generator) -> Pair:
    """A floor around −12, and five tokens whose two logits have nothing to do with each other."""
    teacher = torch.randn(rows, vocab, generator=generator)
    teacher = teacher * _uniform(0, 4, rows, 1, generator=generator) - 12
    noise = torch.randn(rows, vocab, generator=generator)
    student = teacher + noise * _uniform(0, 1, rows, 1, generator=generator)
    every = torch.arange(rows)
    for _ in range(5):
        early = torch.rand(rows, generator=generator) < 0.4
        anywhere = torch.randint(vocab, (rows,), generator=generator)
        column = torch.where(early, torch.randint(min(64, vocab), (rows,), generator=generator), anywhere)
        for side in (teacher, student):
            side[every, column] = _uniform(-22, 18, rows, generator=generator)
    return student, teacher


def raised_token(rows: int, vocab: int, generator: Generator) -> Pair:
    """One token with most of the mass, and a student that is off by noise and by a constant for the row."""
    teacher = torch.randn(rows, vocab, generator=generator) * _uniform(1, 6, rows, 1, generator=generator)
    column = torch.randint(vocab, (rows, 1), generator=generator)
    level = teacher.logsumexp(-1, keepdim=True) + _uniform(0, 8, rows, 1, generator=generator)
    teacher.scatter_(-1, column, level)
    noise = torch.randn(rows, vocab, generator=generator)
    noise *= 3 ** _uniform(-1.5, 0.5, rows, 1, generator=generator)
    noise.scatter_(-1, column, noise.gather(-1, column) / 10)
    return teacher + noise + 20 * torch.randn(rows, 1, generator=generator), teacher


def moved_tokens(rows: int, vocab: int, generator: Generator) -> Pair:
    """Nearly equal sides but for four tokens, each raised or lowered on one side or on both alike."""
    teacher = torch.randn(rows, vocab, generator=generator) * _uniform(0.5, 4, rows, 1, generator=generator)
    noise = torch.randn(rows, vocab, generator=generator)
    student = teacher + noise * 10 ** _uniform(-4, -0.5, rows, 1, generator=generator)
    every = torch.arange(rows)
    for _ in range(4):
        column = torch.randint(vocab, (rows,), generator=generator)
        by = _uniform(-25, 25, rows, generator=generator)
        which = torch.randint(3, (rows,), generator=generator)
        teacher[every, column] += torch.where(which != 0, by, 0)
        student[every, column] += torch.where(which != 1, by, 0)
    return student, teacher


def cut_support(logits: Tensor, how: str) -> Tensor:
    """−inf where a stored distribution or a sampler keeps nothing.

    "16 nats": below log p = −16; "top-p": behind the tokens that hold 0.99 of the mass; "top-k": behind the
    50 largest. The largest token always stays.
    """
    if how == "16 nats":
        return logits.masked_fill(logits.log_softmax(-1) < -16, -INF)
    if how == "top-k":
        return logits.masked_fill(logits < logits.topk(min(50, logits.shape[-1])).values[..., -1:], -INF)
    if how == "top-p":
        sorted_logits, order = logits.sort(-1, descending=True)
        p = sorted_logits.softmax(-1)
        behind = p.cumsum(-1) - p >= 0.99
        return logits.masked_fill(torch.zeros_like(behind).scatter(-1, order, behind), -INF)
    raise ValueError(f"how must be '16 nats', 'top-k' or 'top-p', got {how!r}")


def with_cut(family: Family, how: str, side: str, rows: int, vocab: int, generator: Generator) -> Pair:
    """`family` with −inf on the "teacher", on the "student", or on "both" where the teacher is cut."""
    student, teacher = family(rows, vocab, generator)
    if side == "student":
        return cut_support(student, how), teacher
    cut = cut_support(teacher, how)
    return (student.masked_fill(cut == -INF, -INF) if side == "both" else student), cut


FAMILIES: dict[str, Family] = {
    "tops on a floor": tops_on_a_floor,
    "raised token": raised_token,
    "moved tokens": moved_tokens,
    **{
        f"{how} of the {side}": partial(with_cut, family, how, side)
        for how, side, family in (
            ("16 nats", "teacher", raised_token),
            ("16 nats", "student", raised_token),
            ("16 nats", "both", tops_on_a_floor),
            ("top-p", "teacher", raised_token),
            ("top-p", "both", raised_token),
            ("top-k", "teacher", tops_on_a_floor),
            ("top-k", "student", moved_tokens),
        )
    },
}


def nearer(pair: Pair, generator: Generator) -> Pair:
    """The same rows, the student moved towards the teacher: a factor from 1 to 1e-7 of the way is left."""
    student, teacher = pair
    by = 10 ** _uniform(-7, 0, len(teacher), 1, generator=generator)
    return torch.where(teacher == student, teacher, teacher + by * (student.float() - teacher)), teacher


# -- a small trained model and its copies --------------------------------------------------------------------

_CHARACTERS = 1_500_000  # enough for the vocabulary
# So little text that it is nearly learnt by heart: a large model is as sure of any text as this of its own.
_TRAINED_ON = 20_000
_CONTEXT, _EMBEDDING, _HIDDEN = 6, 48, 128
_STEPS, _BATCH, _RATE = 400, 192, 1.5e-2


def _tokens(vocab: int) -> Tensor:
    """The library's text in words, signs and runs of blanks; a rare word in single characters."""
    text, taken = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text.append(file.read_text("utf-8", errors="replace"))
        taken += len(text[-1])
        if taken > _CHARACTERS:
            break
    pieces = re.findall(r" ?\w+|\n *|[^\w\n]", "".join(text))
    counts = Counter(pieces)
    # Characters first: without them a rare word could not be spelt.
    single = [c for c, _ in Counter("".join(text)).most_common(vocab // 4)]
    words = [word for word, _ in counts.most_common(vocab) if len(word) > 1][: vocab - 1 - len(single)]
    number = {word: i for i, word in enumerate(single + words, 1)}  # 0: what is in neither
    ids: list[int] = []
    for piece in pieces:
        known = number.get(piece)
        ids.extend((known,) if known is not None else (number.get(c, 0) for c in piece))
    return torch.tensor(ids)


class SmallModel(NamedTuple):
    """The next token from the last six: embeddings, one hidden layer, a normalisation, a head with a bias."""

    embedding: Tensor
    inner: Tensor
    gain: Tensor
    head: Tensor
    bias: Tensor

    def hidden(self, contexts: Tensor) -> Tensor:
        """The final states `[rows, 128]` of contexts `[rows, 6]`, which the head multiplies."""
        states = self.embedding[contexts].flatten(1) @ self.inner.T
        return F.rms_norm(states.relu().square(), (_HIDDEN,)) * self.gain

    def logits(self, contexts: Tensor) -> Tensor:
        return self.hidden(contexts) @ self.head.T + self.bias

    def rounded(self, bits: int) -> SmallModel:
        """Every matrix rounded to so many bits, symmetrically, with one scale per row."""

        def to_grid(weight: Tensor) -> Tensor:
            scale = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
            return (weight / scale).round() * scale

        return self._replace(
            embedding=to_grid(self.embedding), inner=to_grid(self.inner), head=to_grid(self.head)
        )

    def to(self, dtype: torch.dtype) -> SmallModel:
        return SmallModel(*(x.to(dtype) for x in self))


class Trained(NamedTuple):
    """A model and text to run it on. What training ends at differs from machine to machine."""

    model: SmallModel
    tokens: Tensor

    def contexts(self, rows: int, generator: Generator) -> Tensor:
        start = torch.randint(len(self.tokens) - _CONTEXT, (rows, 1), generator=generator)
        return self.tokens[start + torch.arange(_CONTEXT)]

    def pair(self, copy: str, rows: int, generator: Generator) -> Pair:
        """(student, teacher) of a copy in COPIES; bfloat16 logits where the copy computes in it."""
        contexts = self.contexts(rows, generator)
        teacher = self.model.logits(contexts)
        if copy == "itself":
            return teacher.clone(), teacher
        if copy == "bfloat16":
            return self.model.to(torch.bfloat16).logits(contexts), teacher
        return self.model.rounded(int(copy.split()[0])).logits(contexts), teacher


COPIES = ("8 bits", "4 bits", "3 bits", "bfloat16", "itself")


def train(vocab: int = 4096, steps: int = _STEPS) -> Trained:
    """Trains the model, in seconds."""
    generator = torch.Generator().manual_seed(0)
    tokens = _tokens(vocab)[:_TRAINED_ON]

    def drawn(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).requires_grad_()

    wide = _CONTEXT * _EMBEDDING
    model = SmallModel(
        drawn(vocab, _EMBEDDING, scale=1.0), drawn(_HIDDEN, wide, scale=wide**-0.5),
        torch.ones(_HIDDEN).requires_grad_(), drawn(vocab, _HIDDEN, scale=0.02),
        torch.zeros(vocab).requires_grad_(),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model, lr=_RATE, betas=(0.9, 0.98))
    span = torch.arange(_CONTEXT + 1)
    with torch.enable_grad():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * (1 - step / steps)
            start = torch.randint(len(tokens) - _CONTEXT, (_BATCH, 1), generator=generator)
            ids = tokens[start + span]
            loss = F.cross_entropy(model.logits(ids[:, :-1]), ids[:, -1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Trained(SmallModel(*(x.detach() for x in model)), tokens)

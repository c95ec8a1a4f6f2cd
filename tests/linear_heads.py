"""Heads for the tests of entries from hidden states, and what the reference makes of their logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import kl_gpu
from kl_gpu import reference
from kl_gpu.kinds import KINDS
from support import DEVICE, FIRST_ORDER, GRADIENT, RELATIVE, to_numpy

# Of a sum in float32, in units of its terms' magnitudes: what the order of addition may lose.
SUM = 16 * 2**-24


class Heads(NamedTuple):
    """Tensors whose products are exact in float32: small multiples of powers of 2."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.student_hidden, self.student_weight, self.student_bias) if x is not None]

    def require_grad(self) -> Heads:
        for leaf in self.leaves:
            leaf.requires_grad_()
        return self

    def div(self, kind: str, **options: Any) -> Tensor:
        biases = {"student_bias": self.student_bias, "teacher_bias": self.teacher_bias}
        return kl_gpu.linear_div(*self[:4], kind, **biases, **options)


def heads(
    lead: tuple[int, ...] = (2, 5),
    columns: tuple[int, int] = (60, 60),
    widths: tuple[int, int] = (6, 9),
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Heads:
    def exact(*shape: int, step: float) -> Tensor:
        return (torch.randint(-8, 9, shape, device=DEVICE) * step).to(dtype)

    sides = [
        x
        for v, h in zip(columns, widths, strict=True)
        for x in (exact(*lead, h, step=1 / 8), exact(v, h, step=1 / 4))
    ]
    biases = (exact(v, step=1 / 8) if bias else None for v in columns)
    return Heads(*sides, *biases)


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, scale: float
) -> np.ndarray:
    z = to_numpy(hidden) @ to_numpy(weight).T + (0 if bias is None else to_numpy(bias))
    return scale * z if cap is None else cap * np.tanh(scale * z / cap)


def products(
    to_z: np.ndarray, side: tuple[Tensor, Tensor, Tensor | None], magnitude: bool = False
) -> list[np.ndarray]:
    """From what flows to the products `[*, columns]` to what flows to hidden states, weight and bias.

    With `magnitude` from what may be off in one to what may be off in the other.
    """
    columns = to_z.shape[-1]
    hidden, weight = (to_numpy(x) for x in side[:2])
    if magnitude:
        weight, hidden = np.abs(weight), np.abs(hidden)
    flat = to_z.reshape(-1, columns)
    found = [to_z @ weight[:columns], np.zeros_like(weight)]
    found[1][:columns] = flat.T @ hidden.reshape(-1, hidden.shape[-1])
    if side[2] is not None:
        found.append(np.zeros(len(weight)))
        found[2][:columns] = flat.sum(0)
    return found


class Expected(NamedTuple):
    """Rows' divergences and the student's gradients, with what may be off in each."""

    value: np.ndarray
    value_bound: np.ndarray
    grads: list[np.ndarray]
    bounds: list[np.ndarray]


def expected(
    given: Heads, kind: str, factor: np.ndarray, vocab_size: int | None = None, softcap: float | None = None,
    teacher_softcap: float | None = None, logit_scale: float = 1.0, teacher_logit_scale: float = 1.0,
    sum_error: float = SUM, **options: float,
) -> Expected:  # fmt: skip
    """In float64, through the logits that linear_div never makes; `factor` multiplies each row.

    `sum_error` is what the products' sums may lose, of their terms' magnitudes.
    """
    given = Heads(*(None if x is None else x.detach() for x in given))
    s = logits(given.student_hidden, given.student_weight, given.student_bias, softcap, logit_scale)
    t = logits(
        given.teacher_hidden, given.teacher_weight, given.teacher_bias, teacher_softcap, teacher_logit_scale
    )
    columns = vocab_size or s.shape[-1]
    s, t = s[..., :columns], t[..., :columns]
    value = reference.divergence(s, t, kind, **options)
    temperatures = {k: v for k, v in options.items() if k != "beta"}
    t_s = temperatures.get("temperature", 1.0)
    log_q, log_p = (
        reference.log_softmax(s, t_s), reference.log_softmax(t, temperatures.get("teacher_temperature", t_s))
    )  # fmt: skip
    # A capped logit is rounded to float32, which moves it by half an ulp of the cap.
    moved = sum(2.0**-24 * cap for cap in (softcap, teacher_softcap) if cap) / t_s
    value_bound = RELATIVE * value + 4 * moved + (2e-7 * (1 + 10) if kind in FIRST_ORDER else 0)
    ratio = np.maximum(1, np.maximum(np.abs(log_q - log_p), value[..., None]))
    if kind == "tv" or (KINDS[kind].formula == "kl" and KINDS[kind].expectation_under != "student"):
        ratio = np.ones_like(ratio)
    if kind == "nla":
        ratio = np.exp(value)[..., None]
    inner = logit_scale * (1 - (s / softcap) ** 2 if softcap else 1)
    to_z = reference.gradients(s, t, kind, **options)[0] * factor[..., None] * inner
    off = np.exp(np.maximum(log_p, log_q)) * np.abs(factor)[..., None] / t_s * logit_scale
    off = off * ratio * (GRADIENT + 8 * moved) + sum_error * np.abs(to_z)

    side = given.student_hidden, given.student_weight, given.student_bias
    grads, bounds = products(to_z, side), products(off, side, magnitude=True)
    return Expected(value * factor, value_bound * np.abs(factor), grads, bounds)


def check(given: Heads, want: Expected, got: Tensor, grads: list[Tensor], where: str) -> None:
    """`got` is reduced or per row; the gradients are those of its sum."""
    total, bound = (x if got.dim() else x.sum() for x in (want.value, want.value_bound))
    wide = given.student_hidden.dtype == torch.float64
    assert (np.abs(to_numpy(got) - total) <= (1e-11 * np.abs(total) if wide else bound)).all(), where
    for leaf, grad, exact, off in zip(given.leaves, grads, want.grads, want.bounds, strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape
        off = off * 1e-5 if wide else off
        assert (np.abs(to_numpy(grad) - exact) <= off).all(), where
        # A gradient of zeros must not pass.
        assert np.abs(exact).max() > 100 * off[np.unravel_index(np.abs(exact).argmax(), exact.shape)], where

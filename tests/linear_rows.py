"""One model's hidden states and head, for the tests of entries that know its rows alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import kl_gpu
from linear_heads import SUM, heads, logits, products
from support import DEVICE, GRADIENT, ROUNDING, TINY, to_numpy


class Head(NamedTuple):
    """Tensors whose products are exact in float32: small multiples of powers of 2."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self if x is not None]

    def require_grad(self) -> Head:
        for leaf in self.leaves:
            leaf.requires_grad_()
        return self

    def copied(self) -> Head:
        return Head(*(None if x is None else x.detach().clone() for x in self))

    def logits(self, columns: int, softcap: float | None, logit_scale: float) -> np.ndarray:
        """In float64, `[*, columns]`; those that the entry never makes."""
        return logits(*(None if x is None else x.detach() for x in self), softcap, logit_scale)[..., :columns]

    def logprobs(self, ids: Tensor, **options: Any) -> Any:
        return kl_gpu.linear_token_logprobs(self.hidden, self.weight, ids, bias=self.bias, **options)

    def topk(self, logprobs: Tensor, ids: Tensor, kind: str, **options: Any) -> Any:
        return kl_gpu.linear_topk_div(
            self.hidden, self.weight, logprobs, ids, kind, student_bias=self.bias, **options
        )


def head(
    lead: tuple[int, ...] = (2, 5), columns: int = 60, width: int = 6, bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Head:  # fmt: skip
    both = heads(lead, (columns, columns), (width, width), bias, dtype)
    return Head(both.student_hidden, both.student_weight, both.student_bias)


def random_head(n: int, v: int, h: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> Head:
    """Of logits of standard deviation 2; products round."""
    shapes = {"hidden": ((n, h), 1.0), "weight": ((v, h), 2 * h**-0.5), "bias": ((v,), 0.5)}
    found = {name: (by * torch.randn(shape, device=DEVICE)).to(dtype) for name, (shape, by) in shapes.items()}
    return Head(found["hidden"], found["weight"], found["bias"] if bias else None)


def tokens(given: Head, columns: int | None = None) -> Tensor:
    return torch.randint(0, columns or len(given.weight), given.hidden.shape[:-1], device=DEVICE)


def teacher(lead: tuple[int, ...], columns: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best log-probabilities of some other model, their ids, and the log of the others' sum."""
    whole = (3 * torch.randn(*lead, columns, dtype=torch.float64, device=DEVICE)).log_softmax(-1)
    logprobs, ids = whole.topk(k)
    rest = whole.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return logprobs.float(), ids, rest.float()


def moved_by_cap(softcap: float | None, temperature: float) -> float:
    """How far a capped logit may be off: it is rounded to float32, half an ulp of the cap."""
    return 2.0**-24 * (softcap or 0.0) / temperature


def check_gradients(
    given: Head, grads: list[Tensor], to_logits: np.ndarray, off: np.ndarray, where: str, *,
    softcap: float | None = None, logit_scale: float = 1.0, sum_error: float = SUM,
) -> None:  # fmt: skip
    """`grads` against what flows to the capped logits, carried through the caps and the products.

    `off` is what may be off in the logits' gradient, elementwise, in units of `support.GRADIENT`; `sum_error`
    is what the products' sums may lose, of their terms' magnitudes.
    """
    wide = given.hidden.dtype == torch.float64
    x = given.logits(to_logits.shape[-1], softcap, logit_scale)
    inner = logit_scale * (1 - (x / softcap) ** 2 if softcap else 1)
    to_z = to_logits * inner
    bound = off * GRADIENT * logit_scale + sum_error * np.abs(to_z)
    wants, bounds = products(to_z, given), products(bound, given, magnitude=True)
    for leaf, grad, want, allowed in zip(given.leaves, grads, wants, bounds, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
        allowed = allowed * (1e-5 if wide else 1)
        allowed = allowed + np.abs(want) * ROUNDING[grad.dtype] + TINY[grad.dtype]
        assert (np.abs(to_numpy(grad) - want) <= allowed).all(), where
        # A gradient of zeros must not pass.
        largest = np.unravel_index(np.abs(want).argmax(), want.shape)
        assert np.abs(want[largest]) > 100 * allowed[largest], where

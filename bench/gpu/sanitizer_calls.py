"""A few calls of every kernel, small enough for a sanitizer: a whole tile, a ragged tail, a masked row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

import kl_gpu

_VOCABS = (1000, 4097, 16384)


def calls(device: torch.device, vocabs: Sequence[int] = _VOCABS) -> int:
    """Value, and gradient of both sides, now and later. Returns how many kinds, dtypes and sizes it called.

    Inputs are made on the CPU, so that nearly every kernel that runs on the device is this library's.
    """
    number = 0
    for kind, dtype, vocab in itertools.product(kl_gpu.KINDS, (torch.bfloat16, torch.float32), vocabs):
        generator = torch.Generator().manual_seed(vocab)
        teacher = 3 * torch.randn(3, vocab, generator=generator)
        student = teacher + torch.randn(3, vocab, generator=generator)
        student, teacher = (x.to(dtype).to(device).requires_grad_() for x in (student, teacher))
        mask = torch.tensor([True, False, True]).to(device)
        value = kl_gpu.divergence(student, teacher, kind, mask=mask, reduction="none")
        later = torch.autograd.grad(value, (student, teacher), torch.ones(3).to(device))
        loss = kl_gpu.divergence(student, teacher, kind)
        at_once = torch.autograd.grad(loss, student)
        for result in (value.detach(), loss.detach(), *later, *at_once):
            if not bool(result.cpu().isfinite().all()):
                raise ArithmeticError(f"{kind}, {dtype}, V = {vocab}: not finite")
        number += 1
    return number


if __name__ == "__main__":
    print(f"{calls(torch.device('cuda'))} calls")

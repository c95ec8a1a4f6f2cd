"""What is saved for backward, also of tensors made under `torch.inference_mode`, which autograd refuses."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

OptionalTensor = TypeVar("OptionalTensor", Tensor, "Tensor | None")

_library = torch.library.Library("kl_gpu", "FRAGMENT")
# A copy that the compiler can neither leave out nor make again in backward from what was copied.
_library.define("copy(Tensor x) -> Tensor")
_library.impl("copy", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("kl_gpu::copy", torch.empty_like, lib=_library)
copy = torch.ops.kl_gpu.copy.default


def ordinary(tensor: Tensor | None) -> Tensor | None:
    """A tensor that autograd will save: of one made under `torch.inference_mode` an alias, anything else as
    it is.

    The alias shares the memory and counts its own versions, so nothing is copied, and nobody notices when
    the tensor is modified before backward: an inference tensor keeps no count.
    """
    if tensor is None or not tensor.is_inference():
        return tensor
    with torch.no_grad():
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        alias.set_(tensor)  # type: ignore[call-overload]
    return alias


def ordinary_rows(tensor: OptionalTensor) -> OptionalTensor:
    """`ordinary` for what has a number or K per row, and is saved by other operators than ours.

    torch.compile cannot ask how a tensor was made. There it is copied by an operator of ours, which the
    compiler neither removes nor repeats in backward from the original: so the copy is saved, not the
    inference tensor.
    """
    if tensor is None or tensor.requires_grad:
        return tensor
    return copy(tensor) if torch.compiler.is_compiling() else ordinary(tensor)  # type: ignore[return-value]


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for backward. `kept` gives them back.

    A traced graph does not know which of its inputs were made under inference_mode, and fails where one of
    them is saved. There all that is not differentiated is kept beside the saved tensors, without a check of
    its version.
    """
    if not torch.compiler.is_compiling():
        ctx.beside = None
        ctx.save_for_backward(*map(ordinary, tensors))
        return
    ctx.beside = [None if x is None or x.requires_grad else x for x in tensors]
    ctx.save_for_backward(*(x if x is not None and x.requires_grad else None for x in tensors))


def kept(ctx: Any) -> tuple[Any, ...]:
    saved: tuple[Any, ...] = ctx.saved_tensors
    if ctx.beside is None:
        return saved
    return tuple(x if y is None else y for x, y in zip(saved, ctx.beside, strict=True))

"""Tensors made under `torch.inference_mode`, which autograd refuses to save for backward."""

from __future__ import annotations

import torch
from torch import Tensor

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


def ordinary_rows(tensor: Tensor) -> Tensor:
    """`ordinary` for what has a number or K per row, and is saved by other operators than ours.

    torch.compile cannot ask how a tensor was made. There it is copied by an operator of ours, which the
    compiler neither removes nor repeats in backward from the original: so the copy is saved, not the
    inference tensor.
    """
    if torch.compiler.is_compiling():
        copied: Tensor = tensor if tensor.requires_grad else copy(tensor)
        return copied
    return tensor if tensor.requires_grad else ordinary(tensor)  # type: ignore[return-value]

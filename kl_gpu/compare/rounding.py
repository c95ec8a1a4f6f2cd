"""A model's own copies with rounded weights: a yardstick for those that were quantised with more care."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .errors import ComparisonError
from .sides import Model

# Weights of a row that share a scale of 16 bits.
GROUP = 32
_SCALE = 2


def rounded(model: Model, bits: int) -> Model:
    """A copy whose matrices are rounded to the nearest of 2^bits − 1 levels, the same on both sides of 0.

    The outermost is the largest of 32 weights of a row, as in llama.cpp's Q8_0. A grid between the least and
    the largest weight, as in Q4_1, would leave the weights of a Q4_1 file as they are. Embeddings, the LM
    head and vectors stay.

    Args:
        model: stays as it is.
        bits: within 2 to 8.

    Raises:
        ComparisonError: bits is not.
    """
    if not 2 <= bits <= 8:
        raise ComparisonError(f"weights are rounded to 2 to 8 bits, got {bits}")
    found = Model(f"{model.name} rtn{bits}", copy.deepcopy(model.model), model.encoder)
    kept = {id(layer.weight) for layer in _ends(found.model) if layer is not None}
    nbytes = 0.0
    with torch.no_grad():
        for weight in found.model.parameters():
            if weight.dim() != 2 or id(weight) in kept:
                nbytes += weight.numel() * weight.element_size()
                continue
            for group in weight.split(GROUP, dim=1):
                group.copy_(_nearest(group, bits))
            groups = len(weight) * -(-weight.shape[1] // GROUP)
            nbytes += weight.numel() * bits / 8 + groups * _SCALE
    found.nbytes = round(nbytes)
    return found


def _ends(model: torch.nn.Module) -> tuple[torch.nn.Module | None, torch.nn.Module | None]:
    return model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]


def _nearest(group: Tensor, bits: int) -> Tensor:
    step = group.abs().amax(1, keepdim=True).float() / (2 ** (bits - 1) - 1)
    return (group.float() / step.clamp_min(torch.finfo(torch.float32).tiny)).round() * step

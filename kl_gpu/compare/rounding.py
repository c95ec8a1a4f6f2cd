"""A model's own copies with rounded weights: a yardstick for those that were quantised with more care."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .errors import ComparisonError
from .sides import Model

# Weights of a row that share a scale and an offset of 16 bits each.
GROUP = 32
_SCALES = 4


def rounded(model: Model, bits: int) -> Model:
    """A copy whose matrices are rounded to the nearest of 2^bits levels between each group's extremes.

    Groups are 32 weights of a row, as llama.cpp's Q4_1 has them. Embeddings, the LM head and vectors stay.

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
            nbytes += weight.numel() * bits / 8 + groups * _SCALES
    found.nbytes = round(nbytes)
    return found


def _ends(model: torch.nn.Module) -> tuple[torch.nn.Module | None, torch.nn.Module | None]:
    return model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]


def _nearest(group: Tensor, bits: int) -> Tensor:
    low, high = group.amin(1, keepdim=True).float(), group.amax(1, keepdim=True).float()
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    return ((group.float() - low) / step).round() * step + low

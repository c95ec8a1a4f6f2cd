"""What makes a model's logits of its last hidden states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .errors import ComparisonError

# How far logits made again may lie from a model's own, relative to the largest: products round otherwise.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 2**-9, torch.bfloat16: 2**-6}


class Head(NamedTuple):
    """logits = cap(scale · (hidden · weightᵀ + bias)), as :func:`kl_gpu.linear_div` has it.

    Attributes:
        weight: `[V, H]`.
        bias: `[V]` or None.
        softcap: c of c · tanh(x / c), or None.
        logit_scale: what the product is multiplied by.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a model of transformers.

        Raises:
            ComparisonError: it has none that is a matrix.
        """
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        if layer is None or not isinstance(getattr(layer, "weight", None), Tensor) or layer.weight.dim() != 2:
            raise ComparisonError("the model has no LM head that is one matrix; record its logits")
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None) or None
        bias = getattr(layer, "bias", None)
        return cls(layer.weight.detach(), None if bias is None else bias.detach(), softcap, scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states `[N, H]`: `[N, V]`, in their dtype."""
        found = linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1:
            found *= self.logit_scale
        return found if self.softcap is None else torch.tanh(found / self.softcap) * self.softcap

    def check(self, hidden: Tensor, logits: Tensor) -> None:
        """See that a model's logits are what this makes of its hidden states.

        Raises:
            ComparisonError: the model does more with them.
        """
        apart = float((self.logits(hidden).float() - logits.float()).abs().max())
        if not apart <= _ROUNDING.get(hidden.dtype, 1e-4) * (1 + float(logits.abs().max())):
            raise ComparisonError(
                "the model's logits are not its LM head's products with its last hidden states (off by "
                f"{apart:.2g}); record its logits"
            )

    def to(self, device: torch.device) -> Head:
        bias = None if self.bias is None else self.bias.to(device)
        return self._replace(weight=self.weight.to(device), bias=bias)

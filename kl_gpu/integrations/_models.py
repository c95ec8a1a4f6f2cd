"""Behind a transformers model: its backbone's hidden states, and the head that makes logits of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Head(NamedTuple):
    """softcap · tanh(logit_scale · (hidden · weightᵀ + bias) / softcap), the arguments of `linear_div`."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def like(self, hidden: Tensor) -> Head:
        """In the hidden states' dtype."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return self._replace(weight=self.weight.to(hidden.dtype), bias=bias)

    def constant(self) -> Head:
        return self._replace(
            weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach()
        )

    def logits(self, hidden: Tensor) -> Tensor:
        found = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return self.softcap * torch.tanh(found / self.softcap) if self.softcap else found

    def check(self, side: str, hidden: Tensor, logits: Tensor) -> None:
        """Refuse a head that does not make the model's own logits of the last token, to bfloat16's noise."""
        with torch.no_grad():
            again, own = self.logits(hidden[:, -1:]).float(), logits[:, -1:].float()
        if again.shape != own.shape or not bool((again - own).abs().max() <= 0.05 * own.abs().max()):
            raise ValueError(
                f"the {side}'s logits are not softcap · tanh(scale · (hidden · weightᵀ + bias) / softcap) of "
                "its backbone's hidden states and its head; use fused_linear=False"
            )


def unwrapped(model: Any) -> Any:
    """The causal language model inside what accelerate, torch.compile and PEFT put around it.

    Raises:
        ValueError: an adapter changes what the model reads (prompt tuning).
    """
    while True:
        if hasattr(model, "get_base_model"):
            if getattr(model.active_peft_config, "is_prompt_learning", False):
                raise ValueError("adapters that prepend virtual tokens move the positions of the logits")
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def head_of(model: Any) -> Head:
    """The head of a causal language model, with the LoRA or trained copy that an adapter put on it.

    A LoRA makes a weight `[V, H]` of its own at each call.

    Raises:
        ValueError: the head is no linear layer, is quantised, or carries an adapter that is not a sum on its
            weight; the message names it.
    """
    model = unwrapped(model)
    weight, bias = _weight_and_bias(model.get_output_embeddings())
    config = model.config.get_text_config()
    found = [
        getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
    ]
    scale = next((x for x in found if x is not None), None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        # Granite and MiniCPM divide by it, HyperCLOVA X multiplies.
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(
            f"the head's weight is a part of shape {list(weight.shape)}, as FSDP 1 and DeepSpeed ZeRO-3 "
            "hold it; use FSDP 2 (fsdp_version: 2) or fused_linear=False"
        )
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(
        _whole(weight),
        None if bias is None else _whole(bias),
        softcap or None,
        1.0 if scale is None else float(scale),
    )


def _whole(x: Any) -> Tensor:
    """Of an FSDP 2 shard the full tensor, differentiable."""
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def _weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    if hasattr(layer, "modules_to_save"):  # PEFT's trained copies
        name = None if layer.disable_adapters else next(iter(layer.active_adapters), None)
        layer = layer.original_module if name is None else layer.modules_to_save[name]
    if hasattr(layer, "lora_A"):
        weight, bias = _weight_and_bias(layer.base_layer)
        active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
        for name in (name for name in active if name in layer.lora_A):
            dropped = layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0
            if dropped or name in layer.lora_variant or layer.lora_bias[name]:
                raise ValueError(
                    f"adapter {name!r} of the head has dropout, a bias or a variant such as DoRA, which is "
                    "no sum on its weight; leave the head out of target_modules, or use fused_linear=False"
                )
            change = layer.lora_B[name].weight @ layer.lora_A[name].weight
            weight = weight + (change * layer.scaling[name]).to(weight.dtype)
        return weight, bias
    if type(layer) is not nn.Linear and not (
        isinstance(layer, nn.Linear) and type(layer.weight) is nn.Parameter
    ):
        raise ValueError(
            f"the head must be a linear layer with a weight in floating point, got {type(layer).__name__}; "
            "use fused_linear=False"
        )
    return layer.weight, layer.bias


@contextmanager
def hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """What the backbone of `model` hands its head, `[batch, time, H]`, one entry for each of its calls."""
    seen: list[Tensor] = []
    hook = unwrapped(model).base_model.register_forward_hook(
        lambda module, inputs, outputs: seen.append(outputs[0])
    )
    try:
        yield seen
    finally:
        hook.remove()

"""Models cut before their LM heads, and the distillation loss on the two parts: `kl_gpu.linear_div`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from _corpus import Windows
from torch import Tensor

from kl_gpu import linear_div


class Cut(NamedTuple):
    """What logits are made of: softcap · tanh(logit_scale · (hidden · weightᵀ + bias) / softcap)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def logits(self) -> Tensor:
        found = self.logit_scale * torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        return found if self.softcap is None else self.softcap * torch.tanh(found / self.softcap)


def cut(model: Any, batch: Windows) -> Cut:
    # No attention mask, as where the logits are asked for.
    hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    head, config = model.get_output_embeddings(), model.config
    # As Gemma, Cohere and Granite name them.
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    return Cut(hidden, head.weight, getattr(head, "bias", None), softcap, scale)


def fused_kl(student: Cut, teacher: Cut, labels: Tensor, **options: Any) -> Tensor:
    """KL(teacher‖student) over the positions that have a label; the logits never exist all at once."""
    return linear_div(
        student.hidden,
        student.weight,
        teacher.hidden.detach(),
        teacher.weight.detach(),
        student_bias=student.bias,
        teacher_bias=None if teacher.bias is None else teacher.bias.detach(),
        softcap=student.softcap,
        teacher_softcap=teacher.softcap,
        logit_scale=student.logit_scale,
        teacher_logit_scale=teacher.logit_scale,
        labels=labels,
        shift=True,
        **options,
    )

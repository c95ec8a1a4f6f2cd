"""Distillation in transformers' `Trainer`: as its `compute_loss_func`, or as a Trainer of its own.

    from kl_gpu.integrations.transformers import DistillationTrainer

    DistillationTrainer(model=student, teacher=teacher, distillation={"kind": "js"}, args=args).train()
    Trainer(model=student, compute_loss_func=distillation_loss(teacher, student=student), args=args).train()

Both do the same; the first moves the teacher to the Trainer's device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import divergence
from ..linear.api import linear_div
from ._models import head_of, hidden_states, unwrapped
from ._packages import base_class

# What a student is given and a teacher is not.
_STUDENTS_OWN = {
    *("labels", "shift_labels", "num_items_in_batch"),
    *("past_key_values", "logits_to_keep", "return_dict"),
}


class distillation_loss:
    """A loss for `Trainer(compute_loss_func=...)`: the divergence from a teacher, over tokens.

    The teacher is set to eval mode and runs in inference mode, on what the student was just given, under
    the student's autocast. A token counts where its label is not −100; the sum is divided by
    `num_items_in_batch`, which makes gradient accumulation exact, else by the tokens that count, also in
    evaluation. `shift_labels`, which sequence parallelism hands out, are taken as they are.

    Args:
        teacher: a causal language model over the student's vocabulary, on the student's device.
        student: the model given to the Trainer, before anything wraps it; a hook on it sees its inputs.
        kind: a name in `kl_gpu.KINDS`.
        fused_linear: take the divergence from hidden states and heads, by :func:`kl_gpu.linear_div`: no
            logits of all tokens exist, and what a metric sees are the last token's. The models must take
            `logits_to_keep`. A LoRA on the student's head is used; the first call checks the heads found.
        **options: those of :func:`kl_gpu.divergence`: temperature, beta, t_squared, hard_weight, …

    Raises:
        ValueError: in a call, without labels, with `inputs_embeds`, or where a head cannot be seen through.
    """

    def __init__(
        self,
        teacher: Any,
        *,
        student: Any,
        kind: str = "forward_kl",
        fused_linear: bool = False,
        **options: Any,
    ) -> None:
        self.teacher, self.student = teacher.eval(), student
        self.kind, self.fused_linear, self.options = kind, fused_linear, options
        self._inputs: dict[str, Any] = {}
        self._hidden: Any = None
        self._autocast: dict[str, Any] = {"enabled": False}
        self._checked = False
        backbone = unwrapped(student).base_model
        self._hooks = [
            student.register_forward_pre_hook(self._see_inputs, with_kwargs=True),
            backbone.register_forward_hook(self._see_hidden),
        ]

    def remove(self) -> None:
        """Take the hooks off the student."""
        for hook in self._hooks:
            hook.remove()

    def _see_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._inputs = dict(kwargs) | ({"input_ids": args[0]} if args else {})
        return (args, {"logits_to_keep": 1, **kwargs}) if self.fused_linear else None

    def _see_hidden(self, module: nn.Module, args: Any, outputs: Any) -> None:
        device = outputs[0].device.type
        self._hidden = outputs[0] if self.fused_linear else None
        # Under accelerate autocast is on within the model's forward, not here outside.
        self._autocast = {
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        inputs, hidden, self._inputs, self._hidden = self._inputs, self._hidden, {}, None
        if inputs.get("inputs_embeds") is not None:
            raise ValueError("the student got inputs_embeds, which another model's embeddings cannot follow")
        given, shift = inputs.get("shift_labels"), True
        if given is not None:
            labels, shift = given, False
        if labels is None:
            raise ValueError("distillation_loss needs labels: tokens with −100 do not count, all others do")
        if isinstance(num_items_in_batch, Tensor):  # one a device, all alike
            num_items_in_batch = num_items_in_batch.reshape(-1)[0]
        how = {"labels": labels, "shift": shift, "normalizer": num_items_in_batch, **self.options}
        for_teacher = {name: value for name, value in inputs.items() if name not in _STUDENTS_OWN}
        device = labels.device.type
        with torch.autocast(device, **self._autocast):
            if not self.fused_linear:
                with torch.inference_mode():
                    logits = self.teacher(**for_teacher).logits
                return divergence(outputs.logits, logits, self.kind, **how)
            with torch.inference_mode(), hidden_states(self.teacher) as seen:
                found = self.teacher(**for_teacher, logits_to_keep=1)
                head = head_of(self.teacher).constant()
            own = head_of(self.student)
            if not self._checked:
                own.check("student", hidden, outputs.logits)
                head.check("teacher", seen[0], found.logits)
                self._checked = True
            return linear_div(
                hidden, own.weight, seen[0], head.weight, self.kind, student_bias=own.bias,
                teacher_bias=head.bias, softcap=own.softcap, teacher_softcap=head.softcap,
                logit_scale=own.logit_scale, teacher_logit_scale=head.logit_scale, **how,
            )  # fmt: skip


_Trainer: Any = base_class("transformers", "Trainer")


class DistillationTrainer(_Trainer):
    """A `transformers.Trainer` whose loss is a divergence from a teacher.

    Args:
        *args, **kwargs: the Trainer's; batches must have labels.
        teacher: as in :class:`distillation_loss`; moved to the Trainer's device, if no device map placed it.
        distillation: the other arguments of :class:`distillation_loss`.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(
        self, *args: Any, teacher: Any = None, distillation: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if teacher is None or self.compute_loss_func is not None:
            raise TypeError("teacher must be given, and compute_loss_func must not")
        if getattr(teacher, "hf_device_map", None) is None:
            teacher = teacher.to(self.args.device)
        self.compute_loss_func: Callable[..., Tensor] = distillation_loss(
            teacher, student=self.model, **distillation or {}
        )

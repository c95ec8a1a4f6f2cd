"""TRL's GRPO with the exact KL to the reference in place of k3, from hidden states and the two heads.

    from kl_gpu.integrations.trl_grpo import GRPOTrainer  # in place of trl's; nothing else changes

k3 is an estimate from the sampled token, whose gradient is that of KL(reference‖policy) in the mean
(docs/rlhf.md); here each token has KL(policy‖reference) over the whole vocabulary and its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear.api import linear_div
from ._models import head_of, hidden_states
from ._packages import base_class, require

_Base: Any = base_class("trl", "GRPOTrainer")


class GRPOTrainer(_Base):
    """`trl.GRPOTrainer`, whose `beta` weighs the exact KL(policy‖reference) of each token, in nats.

    Both distributions are those at the sampling temperature. The reference runs once more in each loss, and
    its log-probabilities, which TRL takes while it generates, are not used. The metric "kl" is the exact one.
    `use_bias_correction_kl` has no effect: it weighs an estimate by the sampled token's importance ratio, and
    here no token's KL depends on what was sampled at it.

    Raises:
        ImportError: TRL is not installed.
    """

    beta: float
    _calls: list[tuple[Any, ...]] | None = None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._calls is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with hidden_states(self.accelerator.unwrap_model(model)) as seen:
            found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._calls.append((seen, args, kwargs))
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.beta == 0.0:
            return super()._compute_loss(model, inputs)
        beta, self.beta, self._calls = self.beta, 0.0, []
        try:
            loss = super()._compute_loss(model, inputs)  # of the policy alone
            (seen, args, kwargs), *_ = self._calls
        finally:
            self.beta, self._calls = beta, None
        return loss + beta * self._total(self._exact_kl(model, seen, args, kwargs, inputs), inputs)

    def _exact_kl(
        self, model: Any, seen: list[Tensor], args: Any, kwargs: Any, inputs: dict[str, Any]
    ) -> Tensor:
        """`[batch, completion]`."""
        kwargs = kwargs | {"compute_entropy": False, "compute_aux_loss": False}
        policy = self.accelerator.unwrap_model(model)
        run = super()._get_per_token_logps_and_entropies
        adapters = require("trl.trainer.grpo_trainer").use_adapter
        with torch.no_grad():
            if self.ref_model is not None:
                reference = self.accelerator.unwrap_model(self.ref_model)
                with hidden_states(reference) as seen_of_reference:
                    run(self.ref_model, *args, **kwargs)
                head = head_of(reference)
            else:
                with (
                    adapters(policy, adapter_name="ref" if "ref" in policy.peft_config else None),
                    hidden_states(policy) as seen_of_reference,
                ):
                    run(model, *args, **kwargs)
                    head = head_of(policy)
        kept = inputs["completion_ids"].shape[1]
        hidden = [torch.cat(x)[:, -kept - 1 : -1] for x in (seen, seen_of_reference)]
        if self.args.cast_lm_head_to_fp32:
            hidden = [x.float() for x in hidden]
        own, head = head_of(policy).like(hidden[0]), head.like(hidden[1]).constant()
        return linear_div(
            hidden[0], own.weight, hidden[1], head.weight, "reverse_kl", student_bias=own.bias,
            teacher_bias=head.bias, softcap=own.softcap, teacher_softcap=head.softcap, reduction="none",
            logit_scale=own.logit_scale, teacher_logit_scale=head.logit_scale, temperature=self.temperature,
            mask=self._mask(inputs),
        )  # fmt: skip

    def _mask(self, inputs: dict[str, Any]) -> Tensor:
        mask: Tensor = inputs["completion_mask"]
        return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

    def _total(self, kl: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The tokens' KL as the loss type sums up tokens; and the metric."""
        mask, accumulated = self._mask(inputs), self.current_gradient_accumulation_steps
        mode = "train" if self.model.training else "eval"
        counts = torch.stack([kl.detach().sum(), mask.sum().to(kl.dtype)])
        total, count = self.accelerator.reduce(counts, reduction="sum")
        self._metrics[mode]["kl"].append((total / count.clamp(min=1)).item())
        steps = accumulated if mode == "train" else 1.0
        if self.loss_type in ("grpo", "sapo"):
            return (kl.sum(-1) / mask.sum(-1).clamp(min=1)).mean() / steps
        if self.loss_type == "bnpo":
            return kl.sum() / mask.sum().clamp(min=1) / steps
        if self.loss_type == "dr_grpo":
            return kl.sum() / (len(kl) * self.max_completion_length) / steps
        if self.loss_type == "luspo":
            return kl.sum(-1).mean() / steps
        if self.loss_type in ("cispo", "dapo", "vespo"):
            items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            return kl.sum() / (
                items * accumulated / self.args.steps_per_generation if mode == "train" else items
            )
        raise ValueError(f"loss_type must be one that this integration knows, got {self.loss_type!r}")

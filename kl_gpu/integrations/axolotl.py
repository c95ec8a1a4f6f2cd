"""axolotl's distillation from stored top-k log-probabilities, computed by kl_gpu.

    plugins:  # in the YAML, behind axolotl.integrations.kd.KDPlugin
      - kl_gpu.integrations.axolotl.KLGpuPlugin

The loss is axolotl's. Its gradient has the T² that the loss has, which axolotl's own leaves out; entries that
`target_mask` takes out are absent from the student's renormalisation too. Where `kd_normalize_topk` is off,
and the temperature is not 1 or the kind not the forward KL, axolotl's function runs. Known against 0.19.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..linear.tokens import linear_token_logprobs
from ..linear.topk import linear_topk_div
from ._packages import base_class
from ._patching import Hook, Patch


def _loss(
    student_input: Tensor, student_lm_head_weight: Tensor, target_token_ids: Tensor, target_logprobs: Tensor,
    target_mask: Tensor, true_labels: Tensor, student_lm_head_bias: Tensor | None = None,
    weight_hard_loss: float = 0.5, weight_soft_loss: float = 0.5, ignore_index: int = -100,
    temperature: float = 1.0, beta: float = 0.0, compiled: bool = False, chunk_size: int = 1024,
    compute_ce_loss: bool = True, normalize_topk: bool = True,
) -> Any:  # fmt: skip
    if not normalize_topk and (temperature != 1.0 or beta != 0.0):
        return NotImplemented
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "js")
    present = target_mask.bool()
    soft: Any = linear_topk_div(
        student_input, student_lm_head_weight,
        # theirs are at the temperature already, and kl_gpu takes them at 1
        (target_logprobs.float() * temperature).detach(), target_token_ids.masked_fill(~present, -1), kind,
        tail="renormalize" if normalize_topk else "truncate", student_bias=student_lm_head_bias,
        beta=beta if kind == "js" else None, temperature=temperature, t_squared=True, mask=present.any(-1),
        reduction="sum", chunk_rows=chunk_size,
    )  # fmt: skip
    loss = weight_soft_loss * soft
    if compute_ce_loss and weight_hard_loss > 0:
        labels = F.pad(true_labels, (0, 1), value=ignore_index)[:, 1:]
        found: Any = linear_token_logprobs(
            student_input, student_lm_head_weight, labels, bias=student_lm_head_bias,
            ignore_index=ignore_index, chunk_rows=chunk_size,
        )  # fmt: skip
        loss = loss - weight_hard_loss * found.sum()
    return loss


#: What is replaced, with the arguments that axolotl 0.19 gives it.
HOOKS = (
    Hook(
        "axolotl.integrations.kd.kernels.liger",
        "LigerFusedLinearKLTopKLogprobFunction",
        "student_input student_lm_head_weight target_token_ids target_logprobs target_mask true_labels "
        "student_lm_head_bias weight_hard_loss weight_soft_loss ignore_index temperature beta compiled "
        "chunk_size compute_ce_loss normalize_topk",
        _loss,
    ),
)
#: As `kl_gpu.integrations.trl.patch` and `unpatch`.
_PATCH = Patch("axolotl", HOOKS)
patch, unpatch = _PATCH.apply, _PATCH.undo


class KLGpuPlugin(base_class("axolotl.integrations.base", "BasePlugin")):  # type: ignore[misc]
    """Patches axolotl before it loads the model."""

    def pre_model_load(self, cfg: Any) -> None:
        """Replace what computes the distillation loss."""
        patch()

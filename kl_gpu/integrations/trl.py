"""TRL's divergences, log-probabilities and entropies, computed by kl_gpu.

    from kl_gpu.integrations import trl as fast

    fast.patch()  # before or after the trainers are imported; or: with fast.patch(): trainer.train()

The numbers stay TRL's, to the rounding of float32. Where an argument asks for what kl_gpu does not compute (a
divergence of every column, probabilities in place of logits, top-1 or mean logits beside log-probabilities, a
head that DeepSpeed ZeRO-3 has spread), TRL's own function runs.
"""

from __future__ import annotations

from . import _trl_losses as ours
from ._patching import Hook, Patch

_LOGITS = "student_logits teacher_logits labels beta temperature reduction"

#: What is replaced, with the arguments that TRL 1.16 gives it.
HOOKS = (
    Hook(
        "trl.trainer.distillation_trainer",
        "_chunked_divergence_loss",
        "student_hidden_states teacher_hidden_states student_lm_head_weight teacher_lm_head_weight "
        "completion_mask beta num_items_in_batch student_lm_head_bias teacher_lm_head_bias "
        "student_logit_scale teacher_logit_scale student_final_logit_softcapping "
        "teacher_final_logit_softcapping temperature",
        ours.chunked_divergence_loss,
    ),
    Hook(
        "trl.kernels.chunked_divergence",
        "ChunkedDivergenceFunction",
        "student_hidden student_weight student_bias teacher_hidden teacher_weight teacher_bias beta "
        "temperature student_logit_scale student_final_logit_softcapping teacher_logit_scale "
        "teacher_final_logit_softcapping",
        ours.chunked_divergence,
    ),
    Hook(
        "trl.kernels.chunked_logprob",
        "ChunkedLogProbFunction",
        "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs",
        ours.chunked_logprobs,
    ),
    Hook(
        "trl.trainer.utils",
        "selective_log_softmax",
        "logits index temperature row_mask",
        ours.selective_log_softmax,
    ),
    Hook("trl.trainer.utils", "entropy_from_logits", "logits chunk_size", ours.entropy_from_logits),
    Hook(
        "trl.trainer.utils",
        "selective_log_softmax_and_entropy",
        "logits index entropy_requires_grad temperature row_mask",
        ours.selective_log_softmax_and_entropy,
    ),
    Hook(
        "trl.experimental.gkd.gkd_trainer",
        "GKDTrainer.generalized_jsd_loss",
        f"{_LOGITS} num_items_in_batch",
        ours.generalized_jsd_loss,
    ),
    Hook(
        "trl.experimental.gold.gold_trainer",
        "GOLDTrainer.generalized_jsd_loss",
        f"{_LOGITS} logits_are_probs num_items_in_batch",
        ours.generalized_jsd_loss,
    ),
)

_PATCH = Patch("trl", HOOKS)


def patch() -> Patch:
    """Replace `HOOKS` in TRL, in every module of it that imported one by name; also a context manager.

    Returns:
        What `with` puts back at its end. Calls may nest.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this TRL lacks a function of `HOOKS`, or it takes other arguments. Each is named, and
            nothing is patched.
    """
    return _PATCH.apply()


def unpatch() -> None:
    """Put TRL's own functions back, however often :func:`patch` was called."""
    _PATCH.undo()

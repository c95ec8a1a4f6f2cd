"""Other libraries' losses as baselines, where they can be imported.

Liger-Kernel's reduce to a mean over tokens and give no value per token, so they do one workload: value and
gradient. TRL's give them per token.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Mean = Callable[[Tensor, Tensor], Tensor]  # of student and teacher logits: 0-d

WORKLOADS = frozenset({"value_grad"})
_LIBRARY = "liger_kernel.transformers"


def liger() -> dict[str, Mean]:
    """Liger-Kernel's losses by kind. They take log-probabilities, so log-softmax is part of the workload.

    Raises:
        ImportError: it is not installed, or not as we know it.
    """

    def of(loss: Any) -> Mean:
        def mean(student: Tensor, teacher: Tensor) -> Tensor:
            return loss(F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1))

        return mean

    divergence, jensen_shannon = _named("LigerKLDIVLoss"), _named("LigerJSD")
    # Its KL with the arguments exchanged has no gradient to the student: reverse KL is JSD's end at β = 1.
    return {
        "forward_kl": of(divergence(reduction="batchmean", log_target=True)),
        "reverse_kl": of(jensen_shannon(beta=1.0)),
        "js": of(jensen_shannon(beta=0.5)),
    }


def liger_linear() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Liger-Kernel's JSD at β = ½ from the student's and the teacher's hidden states and LM heads.

    Raises:
        ImportError: it is not installed, or not as we know it.
    """
    return _named("LigerFusedLinearJSD")(jsd_beta=0.5)


def trl_logprobs() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """TRL's chunked log-probabilities and entropy from hidden states, LM head and token ids.

    Raises:
        ImportError: it is not installed, or not as we know it.
    """
    _without_trainer()
    function = _named("ChunkedLogProbFunction", "trl.kernels")

    def logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        # 32768 columns a tile, as its trainers have it.
        found = function.apply(hidden, weight, None, ids, 1.0, 32768, None, 1.0, ("entropy",))
        return found[0], found[1]

    return logprobs


def trl_divergence() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """TRL's chunked forward KL from hidden states and LM heads of student and teacher, the mean of the rows.

    Raises:
        ImportError: it is not installed, or not as we know it.
    """
    _without_trainer()
    function = _named("ChunkedDivergenceFunction", "trl.kernels.chunked_divergence")

    def divergence(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        value: Tensor = function.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, 0.0)[0]
        return value.mean()

    return divergence


def _without_trainer() -> None:
    """TRL's backward asks its trainers for a context that gathers weights which DeepSpeed has sharded.

    They import a data stack; where that is missing, nothing is sharded either.
    """
    try:
        importlib.import_module("trl.trainer.utils")
    except ImportError:
        if version("trl") is None:
            raise
        stand_in = ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *_: nullcontext()  # type: ignore[attr-defined]
        sys.modules[stand_in.__name__] = stand_in


def version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _named(name: str, library: str = _LIBRARY) -> Any:
    try:
        return getattr(importlib.import_module(library), name)
    except ImportError:
        raise
    except AttributeError:
        raise ImportError(f"{library} has no {name}") from None
    except Exception as error:  # what a library does at import is its own affair; here it only means "absent"
        raise ImportError(f"{library} cannot be imported: {type(error).__name__}: {error}") from error

"""Liger-Kernel's losses as baselines, where they can be imported.

They reduce to a mean over tokens and give no value per token, so they do one workload: value and gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
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


def _named(name: str) -> Any:
    try:
        return getattr(importlib.import_module(_LIBRARY), name)
    except ImportError:
        raise
    except AttributeError:
        raise ImportError(f"{_LIBRARY} has no {name}") from None
    except Exception as error:  # what a library does at import is its own affair; here it only means "absent"
        raise ImportError(f"{_LIBRARY} cannot be imported: {type(error).__name__}: {error}") from error

"""Calls of an operator past PyTorch's dispatcher, which takes 4 µs to find that it has nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

# The dispatch keys that this thread adds to its tensors' own: tracers, transforms of torch.func and modes
# that watch or replace operators are each one more. Should PyTorch no longer tell, every call is dispatched.
_added: Callable[[], Any] | None = getattr(torch._C, "_dispatch_tls_local_include_set", None)
_nobody = _added() if _added else None
with torch.inference_mode():
    _nobody_in_inference_mode = _added() if _added else None
_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = frozenset({type(None), bool, int, float, str})


def nobody_listens(arguments: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would do nothing but call the operator's own function: no tensor asks for a
    gradient or is of a class with operators of its own, and nobody traces, watches or profiles."""
    if torch.compiler.is_compiling() or getattr(profiler, "_is_profiler_enabled", True):
        return False
    if _added is None or _added() not in (_nobody, _nobody_in_inference_mode):
        return False
    with_grad = torch.is_grad_enabled()
    for x in arguments:
        kind = type(x)  # asking for an instance of Tensor takes longer: its metaclass answers
        if kind in _NUMBERS:
            continue
        if kind not in _PLAIN or (with_grad and x.requires_grad):
            return False
    return True

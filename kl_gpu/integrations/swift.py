"""ms-swift's generalised JSD, computed by kl_gpu.

    from kl_gpu.integrations import swift as fast

    fast.patch()  # before the GKD trainer runs; with swift's --external_plugins: a file that does this

Where tensor parallelism brings its own softmax, ms-swift's function runs. Known against ms-swift 4.6.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..functional import js_div
from ._packages import require
from ._patching import Hook, Patch

_MODULE = "swift.rlhf_trainers.gkd_loss"


def _jsd_loss(
    s_logits: Tensor, t_logits: Tensor, beta: float, log_softmax_fn: Any = None, kl_div_fn: Any = None,
    chunk_size: int = 512,
) -> Any:  # fmt: skip
    theirs = require(_MODULE)
    usual = (None, theirs.default_log_softmax, theirs.default_kl_div)
    if log_softmax_fn not in usual or kl_div_fn not in usual:
        return NotImplemented
    return js_div(s_logits, t_logits, beta=float(beta), reduction="sum")


#: What is replaced: the sum over tokens `[N, V]`; their temperature is in the logits already.
HOOKS = (Hook(_MODULE, "jsd_loss", "s_logits t_logits beta log_softmax_fn kl_div_fn chunk_size", _jsd_loss),)
#: As `kl_gpu.integrations.trl.patch` and `unpatch`.
_PATCH = Patch("swift", HOOKS)
patch, unpatch = _PATCH.apply, _PATCH.undo

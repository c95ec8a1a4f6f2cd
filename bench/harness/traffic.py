"""The memory traffic that no implementation can avoid.

Counted in tensors of logits: each input read once, each output written once, per-row results left out
(8 bytes of a row against megabytes). Every system is charged the same, so a GB/s figure is useful
bandwidth: one that moves more than it must comes out slower, not busier.
"""

from __future__ import annotations

PASSES: dict[str, int] = {
    "value": 2,  # read student, read teacher
    "value_grad": 3,  # the same, write the gradient while the row is still on the chip
    "forward_backward": 5,  # forward reads both; backward, much later, reads both again and writes
}

COPY_PASSES = 2  # read the source, write the destination

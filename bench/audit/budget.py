"""Instructions that a kernel may take per element while memory stays the limit.

An H200 has 132 SMs with 4 issue slots of 32 lanes at about 1.7 GHz, and moves 4.3 TB/s. That leaves 26.7
slots a pair where two tensors of 2 bytes are read, 40 where a gradient is written too, twice that in fp32.
tests/test_machine_code.py holds kernels to other bounds where they do better, or cannot reach these.
"""

from __future__ import annotations

_SLOTS_PER_BYTE = 132 * 4 * 32 * 1.7e9 / 4.3e12


def budget(tensors: int, itemsize: int) -> float:
    """Instructions per column of a row where so many tensors of logits' size are read or written."""
    return round(_SLOTS_PER_BYTE * tensors * itemsize, 1)

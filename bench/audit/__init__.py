"""The audit compiles the Triton kernels for GPUs that need not be there, and counts: `python -m bench audit`."""

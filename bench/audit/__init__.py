"""The audit compiles the Triton kernels for GPUs that need not be there: `python -m bench audit`."""

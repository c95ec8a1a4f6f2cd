"""These benchmarks time the C++ kernels beside the machine's memory and beside PyTorch: `python -m bench cpu`."""

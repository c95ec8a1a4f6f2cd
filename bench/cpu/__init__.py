"""The C++ kernels, timed beside the machine's memory and beside PyTorch: `python -m bench cpu`."""

"""Runs the PTX that Triton compiles for NVIDIA GPUs on the CPU; README.md says what is modelled."""

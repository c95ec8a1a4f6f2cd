"""The harness is what all benchmarks share: workloads, contestants, the check of outputs, clocks, reports."""

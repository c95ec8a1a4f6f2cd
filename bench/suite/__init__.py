"""The suite times divergences under pytest-benchmark, ours beside baselines: `python -m bench suite`."""

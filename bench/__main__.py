"""The command line of the benchmarks: `python -m bench COMMAND --help` says more of each."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# By name; a module has add_arguments(parser), and run(options, parser), which returns the exit status.
COMMANDS = {
    "suite": ("suite.command", "kl_gpu beside plain PyTorch and torch.compile, on the device at hand"),
    "cpu": ("cpu.command", "the C++ kernels beside the machine's memory, torch.compile and plain PyTorch"),
    "steps": ("steps", "loss and gradient on the CPU, every system in processes of its own"),
    "gpu": ("gpu.session", "a whole session on a GPU: tests, timings, sanitizer, plots"),
    "linear": ("linear", "linear_div beside its products and baselines, on the device at hand"),
    "linear-rows": (
        "linear_rows",
        "log-probabilities, top-k and statistics from hidden states, beside TRL's",
    ),
    "docstrings": (
        "docstrings",
        "the standard library's documentation as a text: what make demo-compare reads",
    ),
    "entry-memory": ("entry_memory", "memory of each function on logits, beside PyTorch's"),
    "linear-memory": ("linear_memory", "memory of linear_div against the number of rows, beside PyTorch's"),
    "figures": ("figures", "the pictures of the documentation, from stored results"),
    "plots": ("gpu.plots", "the pictures of a stored run"),
    "audit": ("audit.command", "the Triton kernels compiled for every architecture, without a GPU"),
    "host": ("host", "what a call of the Triton backend costs on the host, without a GPU"),
    "accuracy": ("accuracy", "accuracy figures: errors on rows like a trained model's"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    raw = argparse.RawDescriptionHelpFormatter
    if name not in COMMANDS:
        commands = "\n".join(f"  {name:15}{what}" for name, (_, what) in COMMANDS.items())
        about = f"{__doc__}\n\ncommands:\n{commands}"
        overview = argparse.ArgumentParser(prog="python -m bench", description=about, formatter_class=raw)
        overview.add_argument("command", choices=tuple(COMMANDS), metavar="COMMAND")
        overview.parse_args([name])  # prints help, or says that there is no such command
    # Imported only now: no command needs what another one does.
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {name}", description=module.__doc__, formatter_class=raw
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(rest), parser)


if __name__ == "__main__":
    raise SystemExit(main())

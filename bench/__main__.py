"""The command line of the benchmarks: `python -m bench COMMAND --help` says more of each."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

# By name; a module has add_arguments(parser), and run(options, parser), which returns the exit status.
COMMANDS = {
    "suite": ("suite.command", "kl_gpu beside plain PyTorch and torch.compile, on the device at hand"),
    "cpu table": ("cpu.table", "README's CPU table: the kernels beside the machine's memory"),
    "cpu overhead": ("cpu.overhead", "what a call costs where the logits cost nothing"),
    "cpu topk": ("cpu.topk", "token_logprobs and topk_div"),
    "cpu token-stats": ("cpu.token_stats", "token_stats"),
    "gpu": ("gpu.session", "a whole session on a GPU: tests, timings, sanitizer, plots"),
    "linear": ("linear", "linear_div beside its products and baselines, on the device at hand"),
    "plots": ("gpu.plots", "the pictures of a stored run"),
    "readme": ("gpu.readme", "README's GPU table from the stored runs"),
    "audit": ("audit.command", "the Triton kernels compiled for every architecture, without a GPU"),
    "accuracy": ("accuracy", "README's accuracy figures: errors on rows like a trained model's"),
}


def _command(arguments: Sequence[str]) -> str | None:
    """The longest name of a command that the arguments begin with."""
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name
    return None


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return argparse.ArgumentParser(
        prog="python -m bench",
        usage="python -m bench COMMAND ...",
        description=f"{__doc__}\n\ncommands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = _command(given)
    if name is None:
        overview = _overview()
        overview.add_argument("command", nargs="+")
        overview.parse_args(given)
        overview.error(f"no such command: {' '.join(given)}")
    # Imported only now: no command needs what another one does.
    module: ModuleType = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    options = parser.parse_args(given[len(name.split()) :])
    return module.run(options, parser)


if __name__ == "__main__":
    raise SystemExit(main())

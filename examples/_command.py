"""What the examples' command lines share: options that refuse what cannot work, one-line errors, Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# Read when torch is first imported.
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # makes cuBLAS give the same bits again
    "KINETO_LOG_LEVEL": "99",  # keeps the profiler from writing between the tables
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait halve the speed on a busy machine
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def whole(low: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not low <= (number := int(text)) < 2**31:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {low} and below 2**31, got {text}"
            )
        return number

    return whole_number


def positive_number(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return number


def add_common_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--text", metavar="PATH", type=Path, help="a file, or a folder of *.py, *.md and *.txt")
    add("--seed", metavar="N", type=whole(0), default=0, help="same seed, same run; default: %(default)s")
    add("--backend", metavar="NAME", help="of kl_gpu; default: its own choice")
    add("--out", metavar="PATH", type=Path, default=Path("out"), help="for the results; default: %(default)s")


def answer(parser: Parser, work: Callable[[], int]) -> int:
    """The exit code of `work`, which imports what it needs itself.

    Those imports take seconds: a bad option is answered before them, and Ctrl-C is clean in them too.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from _settings import BadInput

        try:
            return work()
        except BadInput as error:
            parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'kl_gpu[demo]'")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130

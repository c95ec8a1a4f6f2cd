"""Distil one language model into another through `kl_gpu`, and measure what that buys.

    python examples/distill.py

trains a small Llama-style teacher on the sources of Python's standard library, then two students from the
same start, with the same batches: one on the labels alone, one through

    kl_gpu.kl_div(student_logits, teacher_logits, direction="forward", temperature=T,
                  labels=labels, shift=True, t_squared=True)

It prints how close each came to the teacher on text none of them saw, and what this loss costs beside plain
PyTorch's on the same logits. With models of your own, from a hub or a folder:

    python examples/distill.py --teacher Qwen/Qwen2.5-1.5B --student Qwen/Qwen2.5-0.5B --text notes/

This file is the command line; the work is in `_experiment.py`, and `_corpus.py`, `_models.py`, `_cost.py` and
`_report.py` beside it each do one part of it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# Read when torch is first imported.
_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # makes cuBLAS give the same bits again
    "KINETO_LOG_LEVEL": "99",  # keeps the profiler from writing between the tables
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait halve the speed on a busy machine
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _whole(low: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not low <= (number := int(text)) < 2**31:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {low} and below 2**31, got {text}"
            )
        return number

    return whole_number


def _positive_number(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return number


def _parser() -> _Parser:
    parser = _Parser(
        prog="distill.py",
        description="Distil a teacher into a student through kl_gpu, and the same student by labels alone. "
        "Without --teacher, small models are made here. What has no default below depends on the device.",
    )
    add = parser.add_argument
    add("--teacher", metavar="NAME", help="hub name or folder of a causal language model; it is not trained")
    add("--student", metavar="NAME", help="the same for the student; needs --teacher")
    add("--text", metavar="PATH", type=Path, help="a file, or a folder of *.py, *.md and *.txt")
    add("--steps", metavar="N", type=_whole(1), help="of each student; the teacher takes twice as many")
    add("--batch", metavar="N", type=_whole(1), help="windows of text a step")
    add("--sequence", metavar="N", type=_whole(2), help="tokens a window")
    add("--rate", metavar="R", type=_positive_number, help="peak learning rate")
    add("--temperature", metavar="T", type=_positive_number, default=1.0, help="default: %(default)s")
    add("--seed", metavar="N", type=_whole(0), default=0, help="same seed, same run; default: %(default)s")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add("--backend", metavar="NAME", help="of kl_gpu; default: its own choice")
    add("--out", metavar="PATH", type=Path, default=Path("out"), help="for the results; default: %(default)s")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.student and not options.teacher:
        parser.error("--student needs --teacher: one trained here would have a tokeniser of its own")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        # Only now, because they take seconds: a bad option is answered at once, and Ctrl-C is clean here too.
        from _experiment import study
        from _settings import BadInput, Settings

        try:
            return study(Settings.choose(**vars(options)))
        except BadInput as error:
            parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed: pip install 'kl_gpu[demo]'")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

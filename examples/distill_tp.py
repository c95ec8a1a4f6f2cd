"""Distil one language model into another where no process holds all columns of the logits.

    torchrun --standalone --nproc-per-node 2 examples/distill_tp.py

On every rank: a small Llama-style teacher and student on the text of Python's own library, both LM heads
sharded over the vocabulary by `parallelize_module`, the student's body sharded by FSDP2. The loss is

    kl_gpu.kl_div(student_logits, teacher_logits, labels=labels, shift=True)

on DTensors that stay where they are: 24 bytes a token and rank cross between the processes, where gathering
the logits would take 4 V. Rank 0 first runs the same thing alone, and prints both loss curves side by side.
"""

from __future__ import annotations

import argparse
import sys

from _command import Parser, answer, positive_number, whole


def _parser() -> Parser:
    parser = Parser(prog="distill_tp.py", description="Distil through sharded LM heads, under torchrun.")
    add = parser.add_argument
    add("--steps", metavar="N", type=whole(1), default=40, help="default: %(default)s")
    add("--batch", metavar="N", type=whole(1), default=2, help="windows of text a step; default: %(default)s")
    add("--sequence", metavar="N", type=whole(2), default=128, help="tokens a window; default: %(default)s")
    add("--rate", metavar="R", type=positive_number, default=1e-3, help="default: %(default)s")
    add("--text", metavar="PATH", default=None, help="a file, or a folder of *.py, *.md and *.txt")
    add("--seed", metavar="N", type=whole(0), default=0, help="default: %(default)s")
    add("--timeout", metavar="S", type=positive_number, default=120.0, help="of a collective, in seconds")
    add(
        "--skip-alone", action="store_true", help="leave out the run of one process that this is held against"
    )
    return parser


def _work(options: argparse.Namespace) -> int:
    from _tensor_parallel import study

    return study(options)


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    return answer(parser, lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())

"""Distil one language model into another through `kl_gpu`, and measure what that buys.

    python examples/distill.py

trains a small Llama-style teacher on the sources of Python's standard library, then two students from the
same start, with the same batches: one on the labels alone, one through

    kl_gpu.kl_div(student_logits, teacher_logits, direction="forward", temperature=T,
                  labels=labels, shift=True, t_squared=True)

(with --fused-linear through kl_gpu.linear_div, which makes the logits itself, a few rows at a time).
It prints how close each came to the teacher on text none of them saw, and what this loss costs beside plain
PyTorch's on the same logits. With models of your own, from a hub or a folder:

    python examples/distill.py --teacher Qwen/Qwen2.5-1.5B --student Qwen/Qwen2.5-0.5B --text notes/

This file is the command line; the work is in `_experiment.py`, and `_corpus.py`, `_models.py`, `_fused.py`,
`_cost.py` and `_report.py` beside it each do one part of it.
"""

from __future__ import annotations

import argparse
import sys

from _command import Parser, add_common_options, answer, positive_number, whole


def _parser() -> Parser:
    parser = Parser(
        prog="distill.py",
        description="Distil a teacher into a student through kl_gpu, and the same student by labels alone. "
        "Without --teacher, small models are made here. What has no default below depends on the device.",
    )
    add = parser.add_argument
    add("--teacher", metavar="NAME", help="hub name or folder of a causal language model; it is not trained")
    add("--student", metavar="NAME", help="the same for the student; needs --teacher")
    add("--steps", metavar="N", type=whole(1), help="of each student; the teacher takes twice as many")
    add("--batch", metavar="N", type=whole(1), help="windows of text a step")
    add("--sequence", metavar="N", type=whole(2), help="tokens a window")
    add("--rate", metavar="R", type=positive_number, help="peak learning rate")
    add("--temperature", metavar="T", type=positive_number, default=1.0, help="default: %(default)s")
    add(
        "--fused-linear",
        action="store_true",
        help="distil through kl_gpu.linear_div, from hidden states and LM heads: the logits never exist",
    )
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: cuda where there is one")
    add_common_options(parser)
    return parser


def _work(options: argparse.Namespace) -> int:
    from _experiment import study
    from _settings import Settings

    return study(Settings.choose(**vars(options)))


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.student and not options.teacher:
        parser.error("--student needs --teacher: one trained here would have a tokeniser of its own")
    return answer(parser, lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())

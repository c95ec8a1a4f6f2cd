"""Train a small language model by policy gradient, with the KL penalty in five forms, and compare them.

    python examples/rlhf_kl.py

pretrains a small Llama on the sources of Python's standard library, and from this reference trains one policy
for each form of the penalty, with the same prompts, noise, steps and coefficient. The reward is the share of
the lines written that parse as Python. The forms are

    none; kl_gpu.kl_div(policy_logits, ref_logits, direction="reverse"), exact at every token;
    kl_gpu.kl_penalty(policy_logprobs, ref_logprobs, "k1"), in the reward; "k2" and "k3", as a loss.

It prints the reward and the exact KL of each on held-out prompts, and draws one against the other.

This file is the command line; the work is in `_rlhf.py`, and `_penalties.py`, `_policy.py`, `_reward.py`,
`_sampling.py` and `_rlhf_report.py` beside it each do one part of it.
"""

from __future__ import annotations

import argparse
import sys

from _command import Parser, add_common_options, answer, positive_number, whole


def _parser() -> Parser:
    parser = Parser(
        prog="rlhf_kl.py",
        description="Train a policy for each form of the KL penalty, from the same reference, and compare "
        "reward and KL. On the CPU.",
    )

    def count(name: str, low: int, default: int, meaning: str) -> None:
        meaning += "; default: %(default)s"
        parser.add_argument(name, metavar="N", type=whole(low), default=default, help=meaning)

    def number(name: str, default: float, meaning: str) -> None:
        meaning += "; default: %(default)s"
        parser.add_argument(name, metavar="R", type=positive_number, default=default, help=meaning)

    count("--pretraining", 1, 300, "steps of the reference")
    count("--steps", 1, 32, "of each policy")
    count("--prompts", 1, 16, "a step")
    count("--samples", 2, 4, "completions of each prompt")
    count("--prompt", 2, 24, "tokens of a prompt")
    count("--tokens", 1, 40, "of a completion")
    count("--held-out", 2, 128, "prompts to measure on")
    number("--rate", 5e-4, "learning rate of the policies")
    number("--coefficient", 0.02, "the penalty's: reward per nat of a completion's KL")
    add_common_options(parser)
    return parser


def _work(options: argparse.Namespace) -> int:
    from _rlhf import study
    from _rlhf_settings import RlhfSettings

    return study(RlhfSettings(**vars(options)))


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    return answer(parser, lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())

"""The reward: how much of what a model wrote is Python."""

from __future__ import annotations

import ast
import warnings

# A line that opens a block, or goes on with one, or decorates, parses only beside the lines it belongs to.
_SURROUNDINGS = (
    "{}",
    "{}\n pass",
    "if 0: pass\n{}\n pass",
    "try: pass\n{}\n pass",
    "{}\n pass\nfinally: pass",
    "{}\ndef f(): pass",
)


def line_parses(line: str) -> bool:
    """Whether `line` is Python on its own, or would be with the block it opens or belongs to."""
    return any(_parses(surrounding.format(line.strip())) for surrounding in _SURROUNDINGS)


def share_that_parses(prompt: str, completion: str) -> float:
    """The share of the lines that `completion` brought to their end that parse, in [0, 1]; of none it is 0.

    Blank lines and comments count on neither side, since they are no achievement. The first line begins where
    the prompt left off. The last one was cut off by the limit on tokens, and is not judged.
    """
    first, *others = completion.split("\n")
    lines = [prompt.rpartition("\n")[2] + first, *others][:-1]
    judged = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return sum(map(line_parses, judged)) / len(judged) if judged else 0.0


def _parses(source: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser's doubts, such as "\d" in a string
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of many brackets
        return False
    return True

"""Language models compared with a base, token by token.

`kl-gpu compare` on a command line, `compare` in Python.
"""

from .errors import ComparisonError
from .run import Comparison, Scores, compare
from .sides import Model, Recorded, open_side
from .windows import Windows, cut

__all__ = [
    "Comparison",
    "ComparisonError",
    "Model",
    "Recorded",
    "Scores",
    "Windows",
    "compare",
    "cut",
    "open_side",
]

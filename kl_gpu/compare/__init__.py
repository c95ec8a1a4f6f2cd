"""Language models compared with a base, token by token.

`kl-gpu compare` and `kl-gpu record` on a command line, `compare`, `record` and `Recording` in Python.
"""

from .errors import ComparisonError
from .head import Head
from .recording import Recording, record
from .run import Comparison, Scores, compare
from .sides import Model, Side, open_side
from .windows import Windows, cut

__all__ = [
    "Comparison",
    "ComparisonError",
    "Head",
    "Model",
    "Recording",
    "Scores",
    "Side",
    "Windows",
    "compare",
    "cut",
    "open_side",
    "record",
]

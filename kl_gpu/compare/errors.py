"""What goes wrong through no fault of the program: a line for the user, not a traceback."""


class ComparisonError(ValueError):
    """An input cannot be compared or read; the message names it."""

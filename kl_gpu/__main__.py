"""`python -m kl_gpu`: what a bug report needs. Ends with 1 where the self-check fails."""

import sys

from .diagnostics import report

text, good = report()
print(text)
sys.exit(not good)

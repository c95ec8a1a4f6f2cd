"""`python -m kl_gpu`: what a bug report needs."""

from .diagnostics import show_config

show_config()

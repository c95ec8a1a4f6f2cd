"""Types and options of the command line that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def device(text: str) -> torch.device:
    """The type of --device."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device") from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be timed; cpu and cuda devices can")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


def usual_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def add_sizes(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Adds an option for each size, with its default."""
    for name, value in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=at_least(1), default=value, metavar="N", help=f"default: {value}")

"""Room for the frames of deep calls, so that none costs a call of the system."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def with_room(function: Callable[..., T], *arguments: object, **named: object) -> T:
    return function(*arguments, **named)


# CPython keeps frames in chunks of 16 KB, and gives a chunk back to the system when its last frame ends.
# Where a hot call lies on the border of two, each call maps and unmaps one: a sixth of the suite's time.
# A frame that says it needs a megabyte gets a chunk of two, and leaves the other to the calls below it.
with_room.__code__ = with_room.__code__.replace(co_stacksize=2**17)

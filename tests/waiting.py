"""Waiting for what another thread or process does: always for an event, with a limit that only a hang reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

HANGS = 600.0  # seconds after which something counts as hanging, on a machine however slow


def until(found: Callable[[], Found], ended: Callable[[], object] = lambda: None) -> Found:
    """The first true value of `found`, looked at again and again.

    AssertionError where `ended` returns anything but None before (as `Popen.poll` does), and after HANGS seconds.
    """
    limit = time.monotonic() + HANGS
    while not (value := found()):
        assert ended() is None or found(), f"it ended before: {ended()}"
        assert time.monotonic() < limit, f"nothing for {HANGS} s"
        time.sleep(0.005)
    return value


class Clock:
    """A clock for the place of a module's `time`: it stands still, or is `tick` seconds later at each look."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 1000.0, tick

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

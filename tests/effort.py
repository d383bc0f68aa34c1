"""How much work something does, on a machine of any speed: its number of calls, or its seconds beside fixed work."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from types import FrameType

# Processor seconds of the fixed work on the machine for which limits in seconds are stated.
REFERENCE = 0.66e-3


def num_calls(work: Callable[[], object]) -> int:
    """The number of functions, of Python and of C, that `work` calls in this thread. The same on every machine."""
    count = 0

    def note(_: FrameType, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    gc.collect()  # finalizers of what earlier tests left count as well
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def is_slower(seconds: float, limit: float) -> bool:
    """Whether work that took these processor seconds here would take `limit` or more on the reference machine.

    A slow processor, or one whose caches and cores others use too, needs more seconds for the same work.
    """
    if seconds < limit:
        return False
    slowness = statistics.median(_fixed_work() for _ in range(15)) / REFERENCE
    return seconds >= limit * max(1.0, slowness)


def _fixed_work() -> float:
    """Processor seconds of calls, arithmetic, small objects and a table in Python."""
    started, number = time.thread_time(), 0
    for _ in range(20_000):
        number = _next(number)
    assert len({str(key): key for key in range(5_000)}) == 5_000
    return time.thread_time() - started


def _next(number: int) -> int:
    return number + 1

"""How fast a run is, how long it still takes and how much memory it has used."""

from __future__ import annotations

import statistics
import sys
from collections import deque

if sys.platform == "win32":
    import psutil
else:
    import resource


class Meter:
    """Speed and remaining time, from the last `window` steps.

    It counts what the caller reports and reads no clock: time between steps (evaluating, saving) is left out.
    """

    def __init__(self, window: int = 20) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)  # (tokens, seconds)

    def update(self, tokens: int, seconds: float) -> float:
        """Count one step of `tokens` real tokens (padding is none) in `seconds`; tokens/s of the window."""
        self._steps.append((tokens, seconds))
        window_seconds = sum(step_seconds for _, step_seconds in self._steps)
        return sum(step_tokens for step_tokens, _ in self._steps) / window_seconds if window_seconds else 0.0

    def eta(self, num_steps_left: int) -> float | None:
        """Seconds that `num_steps_left` steps take at the recent median pace; None before the first step.

        The median, because the first step (compiling, warming caches) says nothing about the others.
        """
        if not self._steps:
            return None
        return num_steps_left * statistics.median(seconds for _, seconds in self._steps)

    @staticmethod
    def memory_bytes() -> int:
        """The most memory this process has had resident so far, in bytes."""
        if sys.platform == "win32":
            return int(psutil.Process().memory_info().peak_wset)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB

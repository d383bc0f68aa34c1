"""The speed of a run, its remaining time and its peak memory."""

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

    It reads no clock, so the time between steps (evaluation, saves) does not count.
    """

    def __init__(self, window: int = 20) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)  # (tokens, seconds)

    def update(self, tokens: int, seconds: float) -> float:
        """Count a step of `tokens` tokens without padding in `seconds`; returns the tokens per second of the window."""
        self._steps.append((tokens, seconds))
        window_seconds = sum(step_seconds for _, step_seconds in self._steps)
        return sum(step_tokens for step_tokens, _ in self._steps) / window_seconds if window_seconds else 0.0

    def eta(self, num_steps_left: int) -> float:
        """Seconds for `num_steps_left` steps at the median time of the window, after the first `update`.

        The median, because the first step (compilation, cold caches) is slower than the others.
        """
        return num_steps_left * statistics.median(seconds for _, seconds in self._steps)

    @staticmethod
    def memory_bytes() -> int:
        """The peak of the resident memory of this process so far, in bytes."""
        if sys.platform == "win32":
            return int(psutil.Process().memory_info().peak_wset)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB

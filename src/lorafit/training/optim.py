"""The learning rate of each step."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, num_steps: int, peak: float, schedule: Literal["cosine", "linear", "constant"], warmup: int
) -> float:
    """The rate of step number `step` (from 0).

    Warm-up rises from peak / (warmup + 1), so that no step has a rate of zero. After it `linear` falls as in
    transformers' linear schedule, `cosine` along half a wave.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, num_steps - warmup)
    return peak * (1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
